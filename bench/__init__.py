"""Benchmarks: each a command that starts what it needs, prints a table and keeps its figures in ``results/``."""
