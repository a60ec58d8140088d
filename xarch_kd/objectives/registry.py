"""Objective classes by kind of loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import nn

from xarch_kd.mapping_file.objectives import Align
from xarch_kd.objectives.base import PairObjective
from xarch_kd.objectives.features import FeatureObjective, SimilarityObjective
from xarch_kd.objectives.queries_keys import AttentionBridgeObjective, RelationObjective
from xarch_kd.objectives.token_mixing import MixingDistanceObjective
from xarch_kd.planning.plan import PairPlan

OBJECTIVES: Final[Mapping[str, Callable[..., PairObjective]]] = {
    **dict.fromkeys(("mse", "relative_mse", "cosine", "normalised_mse", "huber", "l2"), FeatureObjective),
    **dict.fromkeys(("cka", "gram"), SimilarityObjective),
    "relation": RelationObjective,
    "attention_bridge": AttentionBridgeObjective,
    "mixing": MixingDistanceObjective,
}


def build_objective(pair: PairPlan, entry: Align, modules: nn.ModuleDict, generator: torch.Generator) -> PairObjective:
    """Return the match of a pair, whose modules are registered in `modules`, with random weights of `generator`."""
    return OBJECTIVES[pair.loss](pair, entry, modules, generator)
