"""Maps from teacher heads to student heads, for losses on token-mixing matrices of unequal head counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy
import torch
from torch import Tensor

from xarch_kd.errors import UsageError, suggest
from xarch_kd.ops import checks

RULES: Final = ("auto", "mean", "repeat")
# Error of a row's sum in weights given by a user, e.g. three times 0.333.
SUM_TOLERANCE: Final = 5e-3


def head_map(rule: str | Sequence[Sequence[float]], student_heads: int, teacher_heads: int) -> Tensor | None:
    """Return weights [student heads, teacher heads] whose rows sum to 1, or None for a one-to-one map in order.

    `mean`: each student head learns from the mean of a group of neighboring teacher heads; `repeat`: each teacher
    head is the target of a group of neighboring student heads; `auto`: one to one if the counts are equal, else
    `mean` or `repeat`. The weights themselves are accepted too.

    Raises UsageError if the counts do not allow the rule, or the weights do not fit.

    >>> from xarch_kd.projectors import head_map
    >>> head_map("mean", 2, 4)
    tensor([[0.5000, 0.5000, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.5000, 0.5000]])
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


def assignment(costs: Tensor, *, every_teacher: bool = False) -> Tensor:
    """Return weights [student heads, teacher heads] of the cheapest assignment, from costs of the same shape.

    Each student head learns from one teacher head. With more student heads than teacher heads, teacher heads are
    shared evenly (counts differ by at most one). With fewer, each teacher head is used at most once; with
    `every_teacher` each is used exactly once, and a student head learns from the mean of its teacher heads, again
    shared evenly. A cost of infinity forbids a pair. The solution is exact (scipy's linear_sum_assignment).

    Raises UsageError for NaN costs, or costs that forbid every assignment.

    >>> import torch
    >>> from xarch_kd.projectors import assignment
    >>> assignment(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    if costs.dim() != 2 or 0 in costs.shape or bool(torch.isnan(costs).any()):
        raise UsageError(
            "heads: the costs do not fit.",
            found=f"shape {list(costs.shape)}, {int(torch.isnan(costs).sum())} of them NaN",
            allowed="a number for each [student head, teacher head]",
        )
    matrix = costs.detach().to("cpu", torch.float64).numpy()
    students, teachers = matrix.shape
    weights = torch.zeros(students, teachers)
    if students < teachers and every_teacher:
        weights[_grouped(matrix.T), torch.arange(teachers)] = 1
        return weights / weights.sum(1, keepdim=True)
    weights[torch.arange(students), _grouped(matrix)] = 1
    return weights


def head_costs(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return 1 - cosine of each student head's output with each teacher head's, float64 [student heads, teacher heads].

    `student` [batch, time, student heads, dim] and `teacher` [batch, time, teacher heads, dim] are the two mixing
    matrices applied to the same values, e.g. random ones, so that the cosine estimates that of the matrices. `mask`
    [batch, time] is true for tokens that count. A head whose output is 0 has cost 1 everywhere.

    >>> import torch
    >>> from xarch_kd.projectors import head_costs
    >>> head_costs(torch.randn(1, 8, 4, 3), torch.randn(1, 8, 2, 3)).shape
    torch.Size([4, 2])
    """
    cross, own, gram = head_products(student, teacher, mask)
    lengths = torch.outer(own, gram.diagonal()).sqrt()
    return 1 - cross / lengths.where(lengths > 0, 1)


def head_products(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return inner products over tokens and dim, in float64, from the arguments of `head_costs`.

    They are of student with teacher heads [student heads, teacher heads], of each student head with itself [student
    heads], and of teacher heads with each other [teacher heads, teacher heads].

    Raises UsageError for tensors that do not fit.
    """
    checks.refuse_swapped_sides((student,), (teacher,))
    batch, time, _, dim = student.shape
    checks.check_shape("teacher", teacher, (batch, time, teacher.shape[2], dim), "[batch, time, teacher heads, dim]")
    checks.check_shape("mask", mask, (batch, time), "[batch, time]")
    checks.check_mask(mask)
    valid_indices = checks.valid_token_indices(batch * time, mask, student.device)
    with torch.no_grad():
        own, other = (
            (rows if valid_indices is None else rows.index_select(0, valid_indices)).transpose(0, 1).flatten(1).double()
            for rows in (student.flatten(0, 1), teacher.flatten(0, 1))
        )
        return own @ other.T, own.square().sum(1), other @ other.T


def _grouped(costs: numpy.ndarray) -> Tensor:
    """Return the column [rows] of each row in the cheapest assignment.

    With at least as many columns as rows no column is used twice; else each is used rows / columns times, rounded down
    or up.
    """
    # Imported here because reading a mapping file does not need scipy.
    from scipy.optimize import linear_sum_assignment

    rows, columns = costs.shape
    copies = -(-rows // columns)
    wide = numpy.tile(costs, (1, copies))
    if copies > 1:
        # Dummy rows fill the rest of the last copy, so that the other copies are used in full.
        fill = numpy.full((columns * copies - rows, columns * copies), numpy.inf)
        fill[:, columns * (copies - 1) :] = 0
        wide = numpy.concatenate((wide, fill))
    try:
        _, found = linear_sum_assignment(wide)
    except ValueError as error:
        raise UsageError(
            "heads: there is no such assignment.",
            found="costs of infinity that leave a head without a partner",
            allowed="enough finite costs in each row and column",
        ) from error
    return torch.from_numpy(found[:rows] % columns)


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
