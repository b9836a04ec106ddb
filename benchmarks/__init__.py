"""Benchmarks, and the tools that make the tables of docs/."""
