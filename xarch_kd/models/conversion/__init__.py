"""Conversion of a Transformer into a stock hybrid."""
