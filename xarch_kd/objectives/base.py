"""Base class of the objectives of one student/teacher layer pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xarch_kd.errors import UsageError
from xarch_kd.losses.standardize import FeatureStatistics, Standardizer
from xarch_kd.mapping_file.objectives import Align, is_standardized
from xarch_kd.mixing import Mixing
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.planning.plan import PairPlan
from xarch_kd.projectors import Projector, build_projector
from xarch_kd.teacher.feature_cache import Feature


class ProjectedPair(NamedTuple):
    """A projector by the key it is kept under, and what it maps to what: features [batch, time, dim]."""

    key: str
    projector: Projector
    student: Tensor
    teacher: Tensor


class PairObjective(ABC):
    """The objective of one pair.

    `modules` is where projectors and head maps are registered, so that pairs with one key share one. `fitted` are
    constants that calibration text gives, by name; `to_fit` names those that the match needs.
    """

    def __init__(self, pair: PairPlan, entry: Align, modules: nn.ModuleDict, generator: torch.Generator) -> None:
        self.pair, self.entry = pair, entry
        self.fitted: dict[str, Tensor] = {}
        self.to_fit: tuple[str, ...] = ("mean", "deviation") if is_standardized(entry.loss) else ()
        self._teacher = FeatureStatistics()
        self.build(modules, generator)

    def build(self, modules: nn.ModuleDict, generator: torch.Generator) -> None:  # noqa: B027  # most have nothing
        """Register what is trained beside the student."""

    @abstractmethod
    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, normalizers: LossNormalizers) -> Tensor:
        """Return the micro-batch's share of the pair's loss, before any weight."""

    def objective(self, student: Feature, teacher: Feature, mask: Tensor | None) -> Tensor | None:
        """Return the objective of a map that is trained beside the student and changes nothing but that map."""
        return None

    def teacher_sq_norm(self, teacher: Feature, mask: Tensor | None) -> Tensor | None:
        """Return what this micro-batch adds to a divisor of the pair's own, if it has one."""
        return None

    def projections(self, student: Feature, teacher: Feature) -> Iterator[ProjectedPair]:
        """Yield the pair's projectors with what they map."""
        yield from ()

    def observe(self, student: Feature, teacher: Feature, skip: int) -> None:
        """Take in features of calibration text, whose first `skip` tokens are not typical."""
        if "mean" in self.to_fit:
            self._teacher.update(self.target(teacher)[:, skip:])

    def fit(self) -> None:
        """Set what is fitted from what was observed."""
        if "mean" in self.to_fit:
            standardizer = self._teacher.standardizer()
            self.fitted |= {"mean": standardizer.mean.float(), "deviation": standardizer.deviation.float()}

    def target(self, teacher: Feature) -> Tensor:
        """Return the teacher's features as they are compared."""
        target = tensor(teacher).float()
        return target if self.pair.teacher_scale == 1 else target * self.pair.teacher_scale

    def standardizer(self, like: Tensor) -> Standardizer | None:
        """Return the standardiser, if the loss has one. Raises UsageError when it was not fitted yet."""
        if "mean" not in self.to_fit:
            return None
        return Standardizer(self.constant("mean", like), self.constant("deviation", like))

    def constant(self, name: str, like: Tensor) -> Tensor:
        """Return a fitted constant. Raises UsageError when calibration text was not shown yet."""
        if name not in self.fitted:
            raise UsageError(
                f"The objective '{self.pair.name}' needs statistics of calibration text.",
                asked=name,
                found="none yet",
                fix="call xarch_kd.calibration.initialize.prepare(aligner, batches) before the first step",
            )
        return self.fitted[name].to(like.device)

    def _projector(
        self, modules: nn.ModuleDict, key: str, dims: tuple[int, int], generator: torch.Generator
    ) -> Projector | None:
        key = key.replace(".", "-")  # a ModuleDict's keys may not hold dots
        if key not in modules:
            options = {} if self.pair.projector == "none" else self.entry.projector_part.options()
            built = build_projector(self.pair.projector, *dims, generator=generator, **options)
            if built is None:
                return None
            modules[key] = built
        found = modules[key]
        assert isinstance(found, Projector)
        return found


def tensor(feature: Feature) -> Tensor:
    """Return a feature that is a tensor."""
    assert isinstance(feature, Tensor)
    return feature


def mixing(feature: Feature) -> Mixing:
    """Return a feature that is a mixing matrix."""
    assert isinstance(feature, Mixing)
    return feature
