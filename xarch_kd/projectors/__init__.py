"""Projectors between student and teacher features, kept outside the student, and maps between their heads."""

from __future__ import annotations

from xarch_kd.projectors.base import Projector, Split
from xarch_kd.projectors.build import PROJECTOR_KINDS, build_projector, parameter_count, resolve_kind
from xarch_kd.projectors.closed_form import (
    INITS,
    LinearMap,
    ceiling,
    enough_tokens,
    explained_variance,
    initialize,
    pca,
    procrustes,
    resolve_init,
    ridge,
)
from xarch_kd.projectors.custom import CustomProjector, build_custom_projector
from xarch_kd.projectors.diagnostics import Diagnosis, diagnose, explained_alone
from xarch_kd.projectors.heads import assignment, head_costs, head_map
from xarch_kd.projectors.learned_heads import HeadMap
from xarch_kd.projectors.linear import IdentityProjector, LinearProjector, LowRankProjector, OrthogonalProjector
from xarch_kd.projectors.mlp import MLPProjector
from xarch_kd.projectors.statistics import PairStatistics

__all__ = [
    "INITS",
    "PROJECTOR_KINDS",
    "CustomProjector",
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
    "build_custom_projector",
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
    "resolve_init",
    "resolve_kind",
    "ridge",
]
