"""Objectives passed from Python."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from xarch_kd.errors import UsageError
from xarch_kd.losses.features import divisor
from xarch_kd.mapping_file.losses import CustomLossOptions
from xarch_kd.mixing import Mixing
from xarch_kd.objectives.base import PairObjective
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.projectors import Projector
from xarch_kd.teacher.feature_cache import Feature


class CustomPairObjective(PairObjective):
    """Loss of a user's function: a mean over the tokens of a micro-batch, weighted by their number."""

    def build(self, modules: nn.ModuleDict, generator: torch.Generator) -> None:
        pair, options = self.pair, self.entry.loss
        assert isinstance(options, CustomLossOptions)
        self.name = options.name
        self.function = self.custom.objectives[options.name]
        self.projector: Projector | None = None
        if options.takes_projector(self.entry.tap):
            dims = (pair.student_dim, pair.teacher_dim)
            self.projector = self._projector(modules, pair.projector_key, dims, generator)

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, normalizers: LossNormalizers) -> Tensor:
        if isinstance(student, Mixing):
            tokens = student.batch * student.time
        else:
            tokens = student.shape[:2].numel()
            student = student.float()
            student = student if self.projector is None else self.projector(student)
            teacher = self.target(teacher).detach()
        # A mean over no token is 0/0, whose gradient would be NaN.
        if mask is not None and not bool(mask.any()):
            return torch.zeros((), device=mask.device)
        value = self._checked(self.function(student, teacher, mask), student)
        counted = tokens if mask is None else mask.sum()
        return value * (counted / divisor(normalizers.tokens, value))

    def _checked(self, value: object, student: Tensor | Mixing) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
            self._refuse(
                "returned something else than a scalar.",
                f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__,
                "a floating-point tensor of shape []: the mean over the tokens that count",
            )
        needs_gradient = isinstance(student, Mixing) or student.requires_grad
        if torch.is_grad_enabled() and needs_gradient and not value.requires_grad:
            self._refuse(
                "returned a value without a gradient, so the student would not learn from it.",
                "a tensor with requires_grad=False",
                "a differentiable function of the student, without detach(), item() or no_grad",
            )
        return value

    def _refuse(self, what: str, found: str, allowed: str) -> NoReturn:
        raise UsageError(
            f"The custom objective '{self.name}' {what}",
            asked=f"objective {self.pair.name}",
            found=found,
            allowed=allowed,
        )
