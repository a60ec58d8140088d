"""Numerical operations on tensors, each as a dense specification and as a streamed implementation.

An operation never falls back silently: `impl="auto"` chooses, `explain` returns what it would choose, and a requested
implementation that cannot run is an error with the reason. Every operation takes the student first and the teacher
second, detaches the teacher, and returns a named tuple whose first field is `total`.
"""

from __future__ import annotations

from xarch_kd.ops.divergences import Divergence, DivergenceFormula
from xarch_kd.ops.explanation import explain
from xarch_kd.ops.feature_distances import FeatureDistanceFormula
from xarch_kd.ops.heads import Head
from xarch_kd.ops.linear_divergence import DivergenceLoss, linear_divergence
from xarch_kd.ops.mixing_distance import MixingDistance, mixing_distance
from xarch_kd.ops.projected_distance import ProjectedDistance, projected_distance
from xarch_kd.ops.similarity import LayerSimilarity, Similarity, SimilaritySums, similarity
from xarch_kd.ops.teacher import TeacherLogits, TeacherTopK

__all__ = [
    "Divergence",
    "DivergenceFormula",
    "DivergenceLoss",
    "FeatureDistanceFormula",
    "Head",
    "LayerSimilarity",
    "MixingDistance",
    "ProjectedDistance",
    "Similarity",
    "SimilaritySums",
    "TeacherLogits",
    "TeacherTopK",
    "explain",
    "linear_divergence",
    "mixing_distance",
    "projected_distance",
    "similarity",
]
