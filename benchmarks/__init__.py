"""Benchmarks: ``python -m benchmarks``; the demo, and more: ``python -m benchmarks.<name>``."""
