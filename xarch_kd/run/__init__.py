"""The run folder, progress and signals of a run."""
