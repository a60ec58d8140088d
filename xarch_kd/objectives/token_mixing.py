"""Objective between token-mixing matrices."""

from __future__ import annotations

from typing import Any, Final, get_args

import torch
from torch import Tensor, nn

from xarch_kd.errors import check_table
from xarch_kd.losses.mixing import mixing_loss
from xarch_kd.mapping_file.losses import MixingMatch
from xarch_kd.mixing import Mixing
from xarch_kd.objectives.base import PairObjective, mixing
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.ops.row_distances import FORMULAS
from xarch_kd.projectors import HeadMap
from xarch_kd.projectors.heads import assignment, head_costs, head_map
from xarch_kd.teacher.feature_cache import Feature

# Random values to which two mixers are applied; products of the results estimate products of the matrices.
ASSIGNMENT_PROBES: Final = 16


TRAINING_PROBES: Final = 4


PROBE_SEED: Final = 20_260
check_table("mixing distances", FORMULAS, get_args(MixingMatch.model_fields["distance"].annotation))


class MixingDistanceObjective(PairObjective):
    """Distance between the rows of two token-mixing matrices."""

    def build(self, modules: nn.ModuleDict, generator: torch.Generator) -> None:
        assert isinstance(self.entry.loss, MixingMatch)
        self.settings = self.entry.loss
        self.heads: HeadMap | None = None
        self._costs: list[Tensor] = []
        if self.settings.heads == "assignment":
            self.to_fit = ("heads",)
        if self.settings.heads == "learned":
            assert self.pair.student_heads is not None
            assert self.pair.teacher_heads is not None
            self.heads = HeadMap(self.pair.student_heads, self.pair.teacher_heads)
            modules[f"{self.pair.name}-heads".replace(".", "-")] = self.heads

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, normalizers: LossNormalizers) -> Tensor:
        own, target = mixing(student), mixing(teacher)
        weights = self._weights(own, target)
        return mixing_loss(
            self.settings.distance,
            own,
            target,
            normalizer=normalizers.tokens,
            mask=mask,
            head_map=None if weights is None else weights.to(own.device),
            impl=self.settings.impl,
            probes=self.settings.probes,
        )

    def map_objective(self, student: Feature, teacher: Feature, mask: Tensor | None) -> Tensor | None:
        if self.heads is None:
            return None
        return self.heads(*_probed(mixing(student), mixing(teacher), TRAINING_PROBES), mask)

    def observe(self, student: Feature, teacher: Feature, skip: int) -> None:
        if "heads" in self.to_fit:
            self._costs.append(head_costs(*_probed(mixing(student), mixing(teacher), ASSIGNMENT_PROBES)))

    def fit(self) -> None:
        if "heads" in self.to_fit:
            self.fitted["heads"] = assignment(torch.stack(self._costs).mean(0))

    def _weights(self, own: Mixing, target: Mixing) -> Tensor | None:
        if self.heads is not None:
            return self.heads.weights().detach()
        if self.settings.heads in ("assignment", "learned"):
            return self.constant("heads", torch.empty(0))
        return head_map(self.settings.heads, own.heads, target.heads)


@torch.no_grad()
def _probed(student: Mixing, teacher: Mixing, probes: int) -> tuple[Tensor, Tensor]:
    """Return both mixers applied to the same random values: [batch, time, heads, probes] of each."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    made: list[Any] = []
    for side in (student, teacher):
        generator.manual_seed(PROBE_SEED)
        values = torch.randn(side.batch, side.time, 1, probes, generator=generator).to(side.device)
        made.append(side.apply(values.expand(-1, -1, side.heads, -1)))
    return made[0], made[1]
