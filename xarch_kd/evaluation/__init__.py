"""Evaluation of a student against its teacher on the same tokens, with confidence intervals."""
