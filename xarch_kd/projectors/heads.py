"""Which teacher heads a student head learns from, where mixing matrices are compared and the counts differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from xarch_kd.errors import UsageError, suggest

RULES: Final = ("auto", "mean", "repeat")
# Of the sum of a row of weights that a person wrote down, e.g. three times 0.333.
SUM_TOLERANCE: Final = 5e-3


def head_map(rule: str | Sequence[Sequence[float]], student_heads: int, teacher_heads: int) -> Tensor | None:
    """Return weights [student heads, teacher heads] whose rows sum to 1, or None for one head to one head.

    `mean`: each student head learns from the mean of a group of neighbouring teacher heads; `repeat`: each teacher head
    teaches a group of neighbouring student heads; `auto`: one to one where the counts are equal, else whichever fits;
    or the weights themselves.

    Raises UsageError when the counts do not allow the rule, or the weights do not fit.
    """
    if not isinstance(rule, str):
        return _given(rule, student_heads, teacher_heads)
    if rule not in RULES:
        raise UsageError(f"heads: unknown rule.{suggest(rule, RULES)}", asked=rule, allowed=" | ".join(RULES))
    if student_heads == teacher_heads:
        return None
    found = f"{student_heads} student heads and {teacher_heads} teacher heads"
    if rule in ("auto", "mean") and teacher_heads % student_heads == 0:
        size = teacher_heads // student_heads
        return torch.eye(student_heads).repeat_interleave(size, 1) / size
    if rule in ("auto", "repeat") and student_heads % teacher_heads == 0:
        return torch.eye(teacher_heads).repeat_interleave(student_heads // teacher_heads, 0)
    raise UsageError(
        "heads: the counts of heads do not allow this rule.",
        asked=rule,
        found=found,
        allowed="counts of which one divides the other: mean with more teacher heads, repeat with more student heads",
        fix="give the weights [student heads, teacher heads] themselves",
    )


def _given(weights: Sequence[Sequence[float]], student_heads: int, teacher_heads: int) -> Tensor:
    sizes = {len(row) for row in weights}
    if len(weights) != student_heads or sizes != {teacher_heads}:
        raise UsageError(
            "heads: the weights do not fit.",
            found=f"{len(weights)} rows of {', '.join(map(str, sorted(sizes))) or 'no'} weights",
            allowed=f"{student_heads} rows (student heads) of {teacher_heads} weights (teacher heads)",
        )
    found = torch.tensor(weights, dtype=torch.float64)
    totals = found.sum(1)
    if bool((found < 0).any()) or bool(((totals - 1).abs() > SUM_TOLERANCE).any()):
        bad = int(((totals - 1).abs() > SUM_TOLERANCE).nonzero()[0]) if bool((found >= 0).all()) else 0
        raise UsageError(
            "heads: weights must not be negative and each row must sum to 1.",
            found=f"row {bad} sums to {float(totals[bad]):g}",
        )
    return (found / totals[:, None]).float()
