"""Check that a server computes what transformers computes with the students that this package writes."""
