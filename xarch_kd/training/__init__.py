"""Stages: the aligner that owns student and projectors, the trainer that runs it, the run folder that keeps it."""
