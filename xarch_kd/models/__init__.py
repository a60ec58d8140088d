"""Loading models, and turning a Transformer teacher into a stock hybrid student."""
