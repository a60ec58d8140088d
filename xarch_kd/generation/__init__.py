"""Text from a causal language model."""
