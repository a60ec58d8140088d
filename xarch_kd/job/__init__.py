"""The main job: from a plan to a finished run folder, and measuring a run that is there."""
