"""Training objectives: one file per family, their registry and their normalizers."""
