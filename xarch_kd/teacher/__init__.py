"""Features of the frozen teacher: reader and caches."""
