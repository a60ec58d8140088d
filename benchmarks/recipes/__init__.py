"""Recipes on a real teacher, SmolLM2-135M: the demo against a baseline, and layer maps and conversions compared."""
