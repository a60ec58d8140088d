"""Tiny models and input factories; nothing imports this but tests and benchmarks."""
