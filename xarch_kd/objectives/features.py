"""Objectives between features: distances through a projector, and similarities without one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from xarch_kd.losses.cka import cka_loss
from xarch_kd.losses.features import feature_loss, feature_normalizer
from xarch_kd.losses.relations import gram_loss
from xarch_kd.objectives.base import PairObjective, ProjectedPair, tensor
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.teacher.feature_cache import Feature


class FeatureObjective(PairObjective):
    """Features through a projector, perhaps standardised."""

    def build(self, modules: nn.ModuleDict, generator: torch.Generator) -> None:
        pair = self.pair
        self.projector = self._projector(modules, pair.projector_key, (pair.student_dim, pair.teacher_dim), generator)

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, normalizers: LossNormalizers) -> Tensor:
        loss, target = self.entry.loss, self.target(teacher)
        return feature_loss(
            loss.kind,
            tensor(student).float(),
            target,
            normalizer=normalizers.teacher_sq_norms[self.pair.name]
            if loss.kind == "relative_mse"
            else normalizers.tokens,
            mask=mask,
            projector=self.projector,
            standardizer=self.standardizer(target),
            epsilon=getattr(loss, "epsilon", 1e-6),
            delta=getattr(loss, "delta", 1.0),
        )

    def teacher_sq_norm(self, teacher: Feature, mask: Tensor | None) -> Tensor | None:
        if self.entry.loss.kind != "relative_mse":
            return None
        target = self.target(teacher)
        return feature_normalizer("relative_mse", target, mask, standardizer=self.standardizer(target))

    def projections(self, student: Feature, teacher: Feature) -> Iterator[ProjectedPair]:
        if self.projector is not None:
            yield ProjectedPair(self.pair.projector_key, self.projector, tensor(student), self.target(teacher))


class SimilarityObjective(PairObjective):
    """Features compared by how tokens relate, without a projector."""

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, normalizers: LossNormalizers) -> Tensor:
        compare = cka_loss if self.entry.loss.kind == "cka" else gram_loss
        target = self.target(teacher)
        return compare(
            tensor(student).float(),
            target,
            normalizer=normalizers.tokens,
            mask=mask,
            standardizer=self.standardizer(target),
            shared_basis=self.pair.shared_basis,
        )
