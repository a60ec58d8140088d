"""The checked, flattened inputs of `projected_distance`, as every implementation takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xarch_kd.errors import UsageError, suggest
from xarch_kd.ops import checks
from xarch_kd.ops.divergence_inputs import pick

# Name -> what it is for one token, y the projected student, t the teacher.
DISTANCES = {
    "mse": "mean over the width of (y - t)²",
    "squared_error": "sum over the width of (y - t)²",
    "huber": "mean over the width of (y - t)² / 2, or delta (|y - t| - delta / 2) where |y - t| > delta",
    "l2": "root of the mean over the width of (y - t)²",
    "relative_mse": "(y - t)² over t², each summed over all tokens that count",
    "cosine": "1 - cos(y, t)",
    "normalised_mse": "|y - t|² / (|t|² + epsilon)",
}


@dataclass(frozen=True, kw_only=True)
class ProjectedDistanceInputs:
    """`projected_distance` with every argument checked: student [tokens, ds], teacher [tokens, dt].

    `kept` [k] are the indices of the tokens that count (None: all); `shape` are the leading axes that were flattened.
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor | None
    bias: Tensor | None
    distance: str
    epsilon: float
    kept: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    delta: float = 1.0

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return self.student.shape[0] if self.kept is None else self.kept.shape[0]


def check_distance(distance: str, reduction: str, epsilon: float, delta: float = 1.0) -> None:
    """Raise UsageError for an unknown distance, a ratio of sums where it has no meaning, or a number out of range."""
    if distance not in DISTANCES:
        raise UsageError(
            f"There is no such distance.{suggest(distance, DISTANCES)}", asked=distance, allowed=" | ".join(DISTANCES)
        )
    checks.check_reduction(reduction)
    if distance == "relative_mse" and reduction != "mean":
        raise UsageError(
            "relative_mse is a ratio of sums over all tokens, so it has no value for each token and no sum.",
            asked=f"reduction='{reduction}'",
            allowed="reduction='mean'",
            fix="use distance='squared_error' and divide by the teacher's energy over all micro-batches",
        )
    if not (epsilon >= 0 and math.isfinite(epsilon)):
        raise UsageError("epsilon must not be negative.", found=epsilon, allowed=">= 0")
    if not (delta > 0 and math.isfinite(delta)):
        raise UsageError("delta, where huber turns from a square to a line, must be above 0.", found=delta)


def check_inputs(
    student: Tensor,
    teacher: Tensor,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    distance: str,
    mask: Tensor | None,
    epsilon: float,
    delta: float = 1.0,
) -> ProjectedDistanceInputs:
    """Check the tensors and return the problem."""
    checks.check_floating(student=student, teacher=teacher, weight=weight, bias=bias)
    if student.dim() < 2:
        raise UsageError("student does not fit.", found=list(student.shape), allowed="[tokens, width] or more axes")
    leading, width = student.shape[:-1], teacher.shape[-1]
    checks.check_shape("teacher", teacher, (*leading, width), "[leading axes of student, teacher width]")
    if weight is None and student.shape[-1] != width:
        raise UsageError(
            "student and teacher differ in width and there is no projector between them.",
            found=f"student {student.shape[-1]}, teacher {width}",
            fix="pass weight= [teacher width, student width]",
        )
    if weight is None and bias is not None:
        raise UsageError("bias is the projector's: it needs weight=.", found="bias without weight")
    checks.check_shape("weight", weight, (width, student.shape[-1]), "[teacher width, student width]")
    checks.check_shape("bias", bias, (width,), "[teacher width]")
    checks.check_shape("mask", mask, tuple(leading), "[leading axes of student]")
    checks.check_mask(mask)
    checks.check_device(student=student, teacher=teacher, weight=weight, bias=bias, mask=mask)
    return ProjectedDistanceInputs(
        student=student.reshape(-1, student.shape[-1]),
        teacher=teacher.detach().reshape(-1, width),
        weight=weight,
        bias=bias,
        distance=distance,
        epsilon=epsilon,
        delta=delta,
        kept=checks.counted_tokens(math.prod(leading), mask, student.device),
        shape=leading,
        dtype=checks.accumulation_dtype(student, teacher, weight, bias),
    )


def energy(inputs: ProjectedDistanceInputs, chunk: int) -> Tensor:
    """Return the sum over the counted tokens of |teacher|², a scalar."""
    total = inputs.teacher.new_zeros((), dtype=inputs.dtype)
    for start in range(0, inputs.tokens, chunk):
        at = slice(start, min(start + chunk, inputs.tokens))
        rows = inputs.teacher[at] if inputs.kept is None else pick(inputs.teacher, inputs.kept[at])
        total += rows.to(inputs.dtype).square().sum()
    return total
