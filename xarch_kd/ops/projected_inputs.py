"""The checked, flattened inputs of `projected_distance`, as every implementation takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.ops import checks
from xarch_kd.ops.divergence_inputs import pick
from xarch_kd.ops.feature_distances import FORMULAS, FeatureDistanceFormula
from xarch_kd.ops.tables import look_up


@dataclass(frozen=True, kw_only=True)
class ProjectedDistanceInputs:
    """`projected_distance` with every argument checked: student [tokens, ds], teacher [tokens, dt].

    `valid_indices` [k] are the indices of the valid tokens (None: all); `shape` are the leading axes that were
    flattened.
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor | None
    bias: Tensor | None
    formula: FeatureDistanceFormula
    epsilon: float
    valid_indices: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    delta: float = 1.0

    @property
    def tokens(self) -> int:
        """Number of valid tokens."""
        return self.student.shape[0] if self.valid_indices is None else self.valid_indices.shape[0]

    @property
    def arguments(self) -> dict[str, float]:
        """The keyword arguments of the formula."""
        return {name: getattr(self, name) for name in self.formula.parameters}


def read_distance(
    distance: str | FeatureDistanceFormula, reduction: str, epsilon: float, delta: float = 1.0
) -> FeatureDistanceFormula:
    """Return the formula of a distance.

    Raises UsageError for an unknown distance, a ratio of sums where it has no meaning, or a number out of range.
    """
    formula = distance if isinstance(distance, FeatureDistanceFormula) else look_up("distance", distance, FORMULAS)
    checks.check_reduction(reduction)
    if formula.over_teacher_energy and reduction != "mean":
        raise UsageError(
            f"{formula.name} is a ratio of sums over all tokens, so it has no value for each token and no sum.",
            asked=f"reduction='{reduction}'",
            allowed="reduction='mean'",
            fix="use distance='squared_error' and divide by the teacher's energy over all micro-batches",
        )
    if not (epsilon >= 0 and math.isfinite(epsilon)):
        raise UsageError("epsilon must not be negative.", found=epsilon, allowed=">= 0")
    if not (delta > 0 and math.isfinite(delta)):
        raise UsageError("delta, where huber turns from a square to a line, must be above 0.", found=delta)
    return formula


def check_inputs(
    student: Tensor,
    teacher: Tensor,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    formula: FeatureDistanceFormula,
    mask: Tensor | None,
    epsilon: float,
    delta: float = 1.0,
) -> ProjectedDistanceInputs:
    """Check the tensors and return them as every implementation takes them.

    Raises UsageError for tensors that do not fit.
    """
    checks.refuse_swapped_sides((student,), (teacher,))
    checks.check_floating(student=student, teacher=teacher, weight=weight, bias=bias)
    if student.dim() < 2:
        raise UsageError("student does not fit.", found=list(student.shape), allowed="[tokens, dim] or more axes")
    leading, width = student.shape[:-1], teacher.shape[-1]
    checks.check_shape("teacher", teacher, (*leading, width), "[leading axes of student, teacher dim]")
    if weight is None and student.shape[-1] != width:
        raise UsageError(
            "student and teacher differ in dim and there is no projector between them.",
            found=f"student {student.shape[-1]}, teacher {width}",
            fix="pass weight= [teacher dim, student dim]",
        )
    if weight is None and bias is not None:
        raise UsageError("bias is the projector's: it needs weight=.", found="bias without weight")
    checks.check_shape("weight", weight, (width, student.shape[-1]), "[teacher dim, student dim]")
    checks.check_shape("bias", bias, (width,), "[teacher dim]")
    checks.check_shape("mask", mask, tuple(leading), "[leading axes of student]")
    checks.check_mask(mask)
    checks.check_device(student=student, teacher=teacher, weight=weight, bias=bias, mask=mask)
    return ProjectedDistanceInputs(
        student=student.reshape(-1, student.shape[-1]),
        teacher=teacher.detach().reshape(-1, width),
        weight=weight,
        bias=bias,
        formula=formula,
        epsilon=epsilon,
        delta=delta,
        valid_indices=checks.valid_token_indices(math.prod(leading), mask, student.device),
        shape=leading,
        dtype=checks.accumulation_dtype(student, teacher, weight, bias),
    )


def energy(inputs: ProjectedDistanceInputs, chunk: int) -> Tensor:
    """Return the sum over the valid tokens of |teacher|², a scalar."""
    total = inputs.teacher.new_zeros((), dtype=inputs.dtype)
    for start in range(0, inputs.tokens, chunk):
        at = slice(start, min(start + chunk, inputs.tokens))
        rows = inputs.teacher[at] if inputs.valid_indices is None else pick(inputs.teacher, inputs.valid_indices[at])
        total += rows.to(inputs.dtype).square().sum()
    return total
