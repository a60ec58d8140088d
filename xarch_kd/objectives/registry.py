"""Objective classes by the class of their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import nn

from xarch_kd.errors import check_table
from xarch_kd.mapping_file.losses import (
    LOSS_OPTIONS,
    AttentionBridge,
    CenteredKernelAlignment,
    Cosine,
    CustomLossOptions,
    EuclideanDistance,
    Gram,
    Huber,
    LossOptions,
    MeanSquaredError,
    MixingMatch,
    NormalisedMeanSquaredError,
    Relation,
    RelativeMeanSquaredError,
)
from xarch_kd.mapping_file.objectives import Align
from xarch_kd.objectives.base import PairObjective
from xarch_kd.objectives.custom import CustomPairObjective
from xarch_kd.objectives.features import CkaObjective, DistanceObjective, GramObjective
from xarch_kd.objectives.queries_keys import AttentionBridgeObjective, RelationObjective
from xarch_kd.objectives.token_mixing import MixingDistanceObjective
from xarch_kd.planning.custom import CustomObjects
from xarch_kd.planning.plan import PairPlan

OBJECTIVES: Final[Mapping[type[LossOptions], type[PairObjective]]] = {
    MeanSquaredError: DistanceObjective,
    RelativeMeanSquaredError: DistanceObjective,
    Cosine: DistanceObjective,
    NormalisedMeanSquaredError: DistanceObjective,
    Huber: DistanceObjective,
    EuclideanDistance: DistanceObjective,
    CenteredKernelAlignment: CkaObjective,
    Gram: GramObjective,
    Relation: RelationObjective,
    AttentionBridge: AttentionBridgeObjective,
    MixingMatch: MixingDistanceObjective,
    CustomLossOptions: CustomPairObjective,
}
check_table("objective classes", OBJECTIVES, LOSS_OPTIONS)


def build_objective(
    pair: PairPlan, entry: Align, modules: nn.ModuleDict, generator: torch.Generator, custom: CustomObjects
) -> PairObjective:
    """Return the objective of a pair, whose modules are registered in `modules`, with random weights of `generator`."""
    return OBJECTIVES[type(entry.loss)](pair, entry, modules, generator, custom)
