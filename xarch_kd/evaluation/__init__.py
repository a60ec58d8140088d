"""Floor 6: how much worse a student predicts than its teacher, on the same tokens, with intervals."""
