"""Reports of runs: what a run folder holds, in plain words, figures and tables on one self-contained page."""
