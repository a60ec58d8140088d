"""Loading and saving of models and tokenizers."""
