"""Objectives between features: distances through a projector, and similarities without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xarch_kd.errors import check_table
from xarch_kd.losses.cka import cka_loss
from xarch_kd.losses.features import LOSSES, feature_loss, feature_normalizer
from xarch_kd.losses.relations import gram_loss
from xarch_kd.mapping_file.losses import LOSS_OPTIONS, DistanceOptions
from xarch_kd.mapping_file.scalars import kinds_of
from xarch_kd.objectives.base import PairObjective, ProjectedPair, tensor
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.projectors import Projector
from xarch_kd.teacher.feature_cache import Feature

check_table("feature losses", LOSSES, kinds_of(part for part in LOSS_OPTIONS if issubclass(part, DistanceOptions)))


class DistanceObjective(PairObjective):
    """Mean distance between the features of a token, through a projector, perhaps standardized."""

    def build(self, modules: nn.ModuleDict, generator: torch.Generator) -> None:
        pair = self.pair
        self.projector = self._projector(modules, pair.projector_key, (pair.student_dim, pair.teacher_dim), generator)

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, normalizers: LossNormalizers) -> Tensor:
        options, target = self.entry.loss, self.target(teacher)
        assert isinstance(options, DistanceOptions)
        return feature_loss(
            options.kind,
            tensor(student).float(),
            target,
            normalizer=normalizers.teacher_sq_norms[self.pair.name]
            if self.needs_full_step_features
            else normalizers.tokens,
            mask=mask,
            projector=self.projector,
            standardizer=self.standardizer(target),
            **options.parameters(),
        )

    @property
    def needs_full_step_features(self) -> bool:
        """The loss is divided by the teacher's squared norm over a whole step."""
        return LOSSES[self.entry.loss.kind].over_teacher_energy

    def teacher_sq_norm(self, teacher: Feature, mask: Tensor | None) -> Tensor | None:
        if not self.needs_full_step_features:
            return None
        target = self.target(teacher)
        return feature_normalizer(self.entry.loss.kind, target, mask, standardizer=self.standardizer(target))

    @property
    def fitted_projectors(self) -> tuple[Projector | None, ...]:
        """The pair's projector."""
        return (self.projector,)

    def projections(self, student: Feature, teacher: Feature) -> Iterator[ProjectedPair]:
        if self.projector is not None and self.projector.has_closed_form:
            yield ProjectedPair(self.pair.projector_key, self.projector, tensor(student), self.target(teacher))


class SimilarityObjective(PairObjective):
    """Features compared by how tokens relate to each other, without a projector."""

    compare: ClassVar[Callable[..., Tensor]]

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, normalizers: LossNormalizers) -> Tensor:
        target = self.target(teacher)
        options: dict[str, Any] = {"standardizer": self.standardizer(target), "shared_basis": self.pair.shared_basis}
        return self.compare(tensor(student).float(), target, normalizer=normalizers.tokens, mask=mask, **options)


class CkaObjective(SimilarityObjective):
    """One minus linear CKA of student and teacher."""

    compare = staticmethod(cka_loss)


class GramObjective(SimilarityObjective):
    """Distance between the tokens' Gram matrices."""

    compare = staticmethod(gram_loss)
