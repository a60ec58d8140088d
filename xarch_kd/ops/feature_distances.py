"""Distances of a student's (projected) features y from a teacher's t: one table of formulas.

`FORMULAS` is read by every implementation of `projected_distance`: `reference` takes `values`, `streaming` takes
`rows`, `fused` takes `kernel`. A distance of one's own is a `FeatureDistanceFormula` with `values` alone, passed where
a name is: `streaming` then differentiates it by autograd, one chunk of tokens at a time, and there is no `fused`.

    >>> import torch
    >>> from xarch_kd.ops import FeatureDistanceFormula, projected_distance
    >>> def log_cosh(student, teacher):
    ...     return torch.log(torch.cosh(student - teacher)).mean(-1)
    >>> formula = FeatureDistanceFormula(name="log_cosh", values=log_cosh)
    >>> student = torch.randn(4, 8, requires_grad=True)
    >>> projected_distance(student, torch.randn(4, 8), distance=formula).total.backward()
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from xarch_kd.errors import UsageError
from xarch_kd.ops.tables import table

FeatureDistanceName = Literal["mse", "squared_error", "huber", "l2", "relative_mse", "cosine", "normalised_mse"]
Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class FeatureDistanceFormula:
    """Formula of a distance of student features from teacher features.

    `values(student=, teacher=)` returns the distance [tokens] of features [tokens, dim], plus the arguments of the
    operation that `parameters` names. It is called by keyword, so that the two cannot be swapped, and must be
    differentiable in the student; the value of a token depends on that token alone.

    `rows` takes the same and returns the distance and its gradient [tokens, dim] to the student in closed form, None
    for autograd; `kernel` is its code in `kernels/projected_distance.py`, None if there is none. `over_teacher_energy`
    divides the sum over tokens by that of |teacher|², not by the number of tokens.

    Raises UsageError if `values` takes no `student` and `teacher`.

    >>> import torch
    >>> from xarch_kd import ops
    >>> def absolute(student, teacher):
    ...     return (student - teacher).abs().mean(-1)
    >>> ops.FeatureDistanceFormula(name="absolute", values=absolute).name
    'absolute'
    """

    name: str
    values: Callable[..., Tensor]
    rows: Callable[..., Rows] | None = None
    kernel: str | None = None
    parameters: tuple[Literal["epsilon", "delta"], ...] = ()
    over_teacher_energy: bool = False

    def __post_init__(self) -> None:
        try:
            inspect.signature(self.values).bind_partial(student=None, teacher=None)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"The formula of the distance '{self.name}' does not fit.",
                found=str(error),
                allowed="values(student, teacher): features [tokens, dim] of both",
                fix="name its arguments student and teacher",
            ) from error

    def token_values(self, student: Tensor, teacher: Tensor, **arguments: Any) -> Tensor:
        """Return the distance [tokens] of features [tokens, dim].

        Raises UsageError if `values` returns another shape, or no gradient where the student has one.
        """
        found: Any = self.values(student=student, teacher=teacher, **arguments)
        if not isinstance(found, Tensor) or found.shape != student.shape[:-1]:
            raise UsageError(
                f"The formula of the distance '{self.name}' returns the wrong shape.",
                found=list(found.shape) if isinstance(found, Tensor) else type(found).__name__,
                allowed=f"{list(student.shape[:-1])} [tokens]",
                fix="reduce the last axis, the dimensions of the features",
            )
        if torch.is_grad_enabled() and student.requires_grad and not found.requires_grad:
            raise UsageError(
                f"The formula of the distance '{self.name}' has no gradient.",
                allowed="values that autograd can differentiate in the student",
                fix="compute them from student by torch operations, without detach, item or numpy",
            )
        return found

    def rows_with_gradient(self, student: Tensor, teacher: Tensor, **arguments: Any) -> Rows:
        """Return the distance [tokens] and its gradient [tokens, dim] with respect to the student's features."""
        if self.rows is not None:
            return self.rows(student=student, teacher=teacher, **arguments)
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            values = self.token_values(leaf, teacher, **arguments)
        (slope,) = torch.autograd.grad(values, leaf, torch.ones_like(values))
        return values.detach(), slope


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1)


def _mse_rows(student: Tensor, teacher: Tensor) -> Rows:
    difference = student - teacher
    values = difference.square().sum(-1)
    return values / teacher.shape[-1], difference.mul_(2 / teacher.shape[-1])


def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().sum(-1)


def _squared_error_rows(student: Tensor, teacher: Tensor) -> Rows:
    difference = student - teacher
    return difference.square().sum(-1), difference.mul_(2)


def _huber(student: Tensor, teacher: Tensor, delta: float) -> Tensor:
    return functional.huber_loss(student, teacher, reduction="none", delta=delta).mean(-1)


def _huber_rows(student: Tensor, teacher: Tensor, delta: float) -> Rows:
    difference = student - teacher
    slope = difference.clamp(-delta, delta)
    # x² / 2 up to delta and a line beyond: clamp(x) (x - clamp(x) / 2).
    return difference.sub_(slope / 2).mul_(slope).mean(-1), slope.div_(teacher.shape[-1])


def _l2(student: Tensor, teacher: Tensor) -> Tensor:
    # A norm has the subgradient 0 at 0, where a root of a sum has none.
    return torch.linalg.vector_norm(student - teacher, dim=-1)


def _l2_rows(student: Tensor, teacher: Tensor) -> Rows:
    difference = student - teacher
    # By the norm of the difference, whose squares might overflow or vanish.
    length = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    return length.squeeze(-1), difference.mul_(torch.where(length > 0, 1 / length, 0.0))


def _cosine(student: Tensor, teacher: Tensor, epsilon: float) -> Tensor:
    norm = teacher.square().sum(-1)
    lengths = (student.square().sum(-1) + epsilon).sqrt() * (norm + epsilon).sqrt()
    return 1 - (student * teacher).sum(-1) / lengths


def _cosine_rows(student: Tensor, teacher: Tensor, epsilon: float) -> Rows:
    length = (student.square().sum(-1, keepdim=True) + epsilon).sqrt()
    teacher_length = (teacher.square().sum(-1, keepdim=True) + epsilon).sqrt()
    cosine = (student * teacher).sum(-1, keepdim=True) / (length * teacher_length)
    slope = student * (cosine / length.square())
    return 1 - cosine.squeeze(-1), slope.sub_(teacher / (length * teacher_length))


def _normalised_mse(student: Tensor, teacher: Tensor, epsilon: float) -> Tensor:
    return (student - teacher).square().sum(-1) / (teacher.square().sum(-1) + epsilon)


def _normalised_mse_rows(student: Tensor, teacher: Tensor, epsilon: float) -> Rows:
    difference = student - teacher
    values = difference.square().sum(-1)
    norm = teacher.square().sum(-1) + epsilon
    return values / norm, difference.mul_(2 / norm[:, None])


FORMULAS: Final[Mapping[str, FeatureDistanceFormula]] = table(
    "feature distances",
    FeatureDistanceName,
    (
        FeatureDistanceFormula(name="mse", values=_mse, rows=_mse_rows, kernel="mse"),
        FeatureDistanceFormula(
            name="squared_error", values=_squared_error, rows=_squared_error_rows, kernel="squared_error"
        ),
        FeatureDistanceFormula(name="huber", values=_huber, rows=_huber_rows, kernel="huber", parameters=("delta",)),
        FeatureDistanceFormula(name="l2", values=_l2, rows=_l2_rows, kernel="l2"),
        FeatureDistanceFormula(
            name="relative_mse",
            values=_squared_error,
            rows=_squared_error_rows,
            kernel="squared_error",
            over_teacher_energy=True,
        ),
        FeatureDistanceFormula(
            name="cosine", values=_cosine, rows=_cosine_rows, kernel="cosine", parameters=("epsilon",)
        ),
        FeatureDistanceFormula(
            name="normalised_mse",
            values=_normalised_mse,
            rows=_normalised_mse_rows,
            kernel="normalised_mse",
            parameters=("epsilon",),
        ),
    ),
)
