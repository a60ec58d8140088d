"""Training of one stage: the aligner that owns student and projectors, and the trainer that runs it."""
