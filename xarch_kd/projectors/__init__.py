"""Floor 3: learned maps from a student's width to a teacher's, kept beside the student and never inside it."""

from __future__ import annotations

from xarch_kd.projectors.linear import LinearProjector, build_projector, ridge

__all__ = ["LinearProjector", "build_projector", "ridge"]
