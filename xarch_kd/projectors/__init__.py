"""Floor 3: what bridges unequal models: maps of widths that are learned, kept beside the student, and maps of heads."""

from __future__ import annotations

from xarch_kd.projectors.base import Projector, Split
from xarch_kd.projectors.heads import head_map
from xarch_kd.projectors.linear import LinearProjector, build_projector, ridge

__all__ = ["LinearProjector", "Projector", "Split", "build_projector", "head_map", "ridge"]
