"""Benchmarks, and the tools that make the tables and pictures of docs/."""
