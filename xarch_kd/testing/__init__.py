"""Tiny models and input factories for tests and benchmarks, the only importers."""
