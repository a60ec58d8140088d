"""Base class of the objectives of one student/teacher layer pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xarch_kd.errors import UsageError
from xarch_kd.losses.standardize import FeatureStatistics, Standardizer
from xarch_kd.mapping_file.objectives import Align
from xarch_kd.mapping_file.projectors import CustomProjectorOptions
from xarch_kd.mixing import Mixing
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.planning.custom import CustomObjects
from xarch_kd.planning.plan import PairPlan
from xarch_kd.projectors import Projector, build_custom_projector, build_projector
from xarch_kd.teacher.feature_cache import Feature


class ProjectedPair(NamedTuple):
    """A projector, the key that it is registered under, and its input and target: features [batch, time, dim]."""

    key: str
    projector: Projector
    student: Tensor
    teacher: Tensor


class PairObjective(ABC):
    """Loss of one student/teacher layer pair: projector, calibration statistics, loss.

    `modules` is where projectors and head maps are registered, so that pairs with one key share one; `custom` holds
    the objects that the mapping file refers to by name. `fitted` are constants from calibration text, by name, and
    `to_fit` the names of those that the objective needs.
    """

    def __init__(
        self,
        pair: PairPlan,
        entry: Align,
        modules: nn.ModuleDict,
        generator: torch.Generator,
        custom: CustomObjects,
    ) -> None:
        self.pair, self.entry, self.custom = pair, entry, custom
        self.fitted: dict[str, Tensor] = {}
        self.to_fit: tuple[str, ...] = ("mean", "deviation") if entry.loss.is_standardized else ()
        self._teacher = FeatureStatistics()
        self.build(modules, generator)

    def build(self, modules: nn.ModuleDict, generator: torch.Generator) -> None:  # noqa: B027  # most have nothing
        """Register the parameters that train beside the student."""

    @property
    def needs_full_step_features(self) -> bool:
        """The loss is divided by `teacher_sq_norm` over all micro-batches of a step."""
        return False

    @abstractmethod
    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, normalizers: LossNormalizers) -> Tensor:
        """Return the micro-batch's share of the pair's loss, before any weight."""

    def map_objective(self, student: Feature, teacher: Feature, mask: Tensor | None) -> Tensor | None:
        """Return the objective of a map that is trained beside the student and changes nothing but that map."""
        return None

    def teacher_sq_norm(self, teacher: Feature, mask: Tensor | None) -> Tensor | None:
        """Return what this micro-batch adds to the pair's own divisor, if it has one."""
        return None

    @property
    def fitted_projectors(self) -> tuple[Projector | None, ...]:
        """The projectors that `projections` yields, which a stage starts in closed form unless told otherwise."""
        return ()

    def projections(self, student: Feature, teacher: Feature) -> Iterator[ProjectedPair]:
        """Yield the pair's projectors that have a closed form, each with its input and target."""
        yield from ()

    def observe(self, student: Feature, teacher: Feature, skip: int) -> None:
        """Add features of calibration text to the statistics; skips the first `skip` tokens of each row."""
        if "mean" in self.to_fit:
            self._teacher.update(self.target(teacher)[:, skip:])

    def fit(self) -> None:
        """Set the fitted constants from the statistics."""
        if "mean" in self.to_fit:
            standardizer = self._teacher.standardizer()
            self.fitted |= {"mean": standardizer.mean.float(), "deviation": standardizer.deviation.float()}

    def target(self, teacher: Feature) -> Tensor:
        """Return the teacher's features as they are compared."""
        target = tensor(teacher).float()
        return target if self.pair.teacher_scale == 1 else target * self.pair.teacher_scale

    def standardizer(self, like: Tensor) -> Standardizer | None:
        """Return the standardizer, if the loss has one. Raises UsageError if it was not fitted yet."""
        if "mean" not in self.to_fit:
            return None
        return Standardizer(self.constant("mean", like), self.constant("deviation", like))

    def constant(self, name: str, like: Tensor) -> Tensor:
        """Return a fitted constant. Raises UsageError if no calibration text was observed yet."""
        if name not in self.fitted:
            raise UsageError(
                f"The objective '{self.pair.name}' needs statistics of calibration text.",
                asked=name,
                found="no statistics",
                fix="call xarch_kd.calibration.initialize.prepare(aligner, batches) before the first step",
            )
        return self.fitted[name].to(like.device)

    def _projector(
        self, modules: nn.ModuleDict, key: str, dims: tuple[int, int], generator: torch.Generator
    ) -> Projector | None:
        key = key.replace(".", "-")  # a ModuleDict's keys may not hold dots
        if key not in modules:
            built = self._build_projector(dims, generator)
            if built is None:
                return None
            modules[key] = built
        found = modules[key]
        assert isinstance(found, Projector)
        return found

    def _build_projector(self, dims: tuple[int, int], generator: torch.Generator) -> Projector | None:
        part = self.entry.projector_part
        if isinstance(part, CustomProjectorOptions):
            seed = int(torch.randint(2**62, (), generator=generator))
            return build_custom_projector(part.name, self.custom.projectors[part.name], *dims, seed=seed)
        options = {} if self.pair.projector == "none" else part.options()
        return build_projector(self.pair.projector, *dims, generator=generator, **options)


def tensor(feature: Feature) -> Tensor:
    """Return a feature that is a tensor."""
    assert isinstance(feature, Tensor)
    return feature


def mixing(feature: Feature) -> Mixing:
    """Return a feature that is a token-mixing matrix."""
    assert isinstance(feature, Mixing)
    return feature
