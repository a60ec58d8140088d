"""Floor 2: numerical operations on tensors, each as a dense specification and as a streamed implementation.

An operation never falls back silently: `impl="auto"` chooses, `explain` says what it would choose, and a requested
implementation that cannot run is an error with the reason.
"""

from __future__ import annotations

from xarch_kd.ops.divergences import Divergence
from xarch_kd.ops.explanation import explain
from xarch_kd.ops.linear_divergence import DivergenceLoss, linear_divergence
from xarch_kd.ops.mixing_distance import MixingDistance, mixing_distance
from xarch_kd.ops.projected_distance import projected_distance
from xarch_kd.ops.similarity import LayerSimilarity, Similarity, SimilaritySums, similarity
from xarch_kd.ops.teacher import TeacherTopK

__all__ = [
    "Divergence",
    "DivergenceLoss",
    "LayerSimilarity",
    "MixingDistance",
    "Similarity",
    "SimilaritySums",
    "TeacherTopK",
    "explain",
    "linear_divergence",
    "mixing_distance",
    "projected_distance",
    "similarity",
]
