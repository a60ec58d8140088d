"""Floor 3: what bridges unequal models: maps of widths that are learned, kept beside the student, and maps of heads."""

from __future__ import annotations

from xarch_kd.projectors.base import Projector, Split
from xarch_kd.projectors.build import KINDS, build_projector, parameter_count, resolve_kind
from xarch_kd.projectors.closed_form import (
    STARTS,
    LinearMap,
    ceiling,
    enough_tokens,
    explained_variance,
    initialize,
    pca,
    procrustes,
    resolve_start,
    ridge,
)
from xarch_kd.projectors.diagnostics import Diagnosis, diagnose, explained_alone
from xarch_kd.projectors.heads import assignment, head_costs, head_map
from xarch_kd.projectors.learned_heads import HeadMap
from xarch_kd.projectors.linear import IdentityProjector, LinearProjector, LowRankProjector, OrthogonalProjector
from xarch_kd.projectors.mlp import MLPProjector
from xarch_kd.projectors.statistics import PairStatistics

__all__ = [
    "KINDS",
    "STARTS",
    "Diagnosis",
    "HeadMap",
    "IdentityProjector",
    "LinearMap",
    "LinearProjector",
    "LowRankProjector",
    "MLPProjector",
    "OrthogonalProjector",
    "PairStatistics",
    "Projector",
    "Split",
    "assignment",
    "build_projector",
    "ceiling",
    "diagnose",
    "enough_tokens",
    "explained_alone",
    "explained_variance",
    "head_costs",
    "head_map",
    "initialize",
    "parameter_count",
    "pca",
    "procrustes",
    "resolve_kind",
    "resolve_start",
    "ridge",
]
