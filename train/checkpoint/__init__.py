"""Checkpoints: their format, saving, resuming, and the weights that other commands read from them."""
