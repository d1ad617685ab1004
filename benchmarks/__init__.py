"""Benchmarks and the demo: ``python -m benchmarks.<name>``."""
