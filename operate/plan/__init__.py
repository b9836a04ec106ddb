"""Predict a run's step time, memory, failures, duration and price before it is run; launch/plan.py is the command."""
