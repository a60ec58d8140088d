"""The checked inputs of `mixing_distance`, as every implementation takes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.mixing import Mixing, SoftmaxMixing
from xarch_kd.ops import checks
from xarch_kd.ops.row_distances import FORMULAS, EntryFormula, LogarithmFormula
from xarch_kd.ops.tables import look_up

# How far the rows of a head map may be from summing to 1: what rounding the weights to bfloat16 does to a sum of 8.
SUM_TOLERANCE: Final = 0.01


@dataclass(frozen=True, kw_only=True)
class MixingDistanceInputs:
    """`mixing_distance` with every argument checked.

    `teacher` is detached; `head_map` [student heads, teacher heads] is in `dtype`, or None for the identity;
    `valid_mask` [batch, time] is true at rows that are valid in both mixings and in the caller's mask.
    """

    student: Mixing
    teacher: Mixing
    formula: EntryFormula | LogarithmFormula
    head_map: Tensor | None
    valid_mask: Tensor
    epsilon: float
    dtype: torch.dtype

    def mixed(self, teacher: Tensor) -> Tensor:
        """Return head_map @ teacher [batch, heads, ...], for whatever the teacher has of each head."""
        if self.head_map is None:
            return teacher
        flat = teacher.reshape(teacher.shape[0], teacher.shape[1], -1)
        return (self.head_map @ flat).view(teacher.shape[0], -1, *teacher.shape[2:])


def check_inputs(
    student: Mixing,
    teacher: Mixing,
    *,
    distance: str,
    head_map: Tensor | None,
    mask: Tensor | None,
    epsilon: float,
) -> MixingDistanceInputs:
    """Check the arguments and return them as every implementation takes them.

    Raises UsageError for arguments that do not fit.
    """
    formula = look_up("distance", distance, FORMULAS)
    check_epsilon(epsilon)
    checks.refuse_swapped_sides(student.factors.values(), teacher.factors.values())
    _check_sizes(student, teacher, head_map, mask)
    dtype = torch.promote_types(teacher.dtype, student.dtype)
    if head_map is not None:
        _check_head_map(head_map, formula)
        head_map = head_map.detach().to(dtype)
    valid_mask = teacher.valid_mask() & student.valid_mask()
    if mask is not None:
        valid_mask = valid_mask & mask
    if isinstance(formula, LogarithmFormula):
        _check_support(student, teacher, formula, valid_mask)
    return MixingDistanceInputs(
        student=student,
        teacher=teacher.detach(),
        formula=formula,
        head_map=head_map,
        valid_mask=valid_mask,
        epsilon=epsilon,
        dtype=dtype,
    )


def check_epsilon(epsilon: float) -> None:
    """Raise UsageError for an epsilon that is not positive or not finite."""
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise UsageError("epsilon must be positive.", found=epsilon, allowed="> 0")


def _check_sizes(student: Mixing, teacher: Mixing, head_map: Tensor | None, mask: Tensor | None) -> None:
    shape = (student.batch, student.time)
    if (teacher.batch, teacher.time) != shape:
        raise UsageError(
            "The mixings are of different sequences.",
            found=f"teacher {[teacher.batch, teacher.time]}, student {list(shape)}",
            allowed="one [batch, time]",
        )
    if student.time < 2:
        raise UsageError(
            "The mixing of a single token has one entry and cannot be compared.",
            found=f"sequences of {student.time} token" + ("" if student.time == 1 else "s"),
            allowed=">= 2 tokens",
        )
    if head_map is None and teacher.heads != student.heads:
        raise UsageError(
            "The mixings differ in heads and no map between them is given.",
            found=f"teacher {teacher.heads}, student {student.heads}",
            fix="pass head_map= [student heads, teacher heads]",
        )
    checks.check_shape("head_map", head_map, (student.heads, teacher.heads), "[student heads, teacher heads]")
    checks.check_shape("mask", mask, shape, "[batch, time]")
    checks.check_mask(mask)
    places = {
        f"{side} {name}": factor
        for side, mixing in (("teacher", teacher), ("student", student))
        for name, factor in mixing.factors.items()
    }
    checks.check_device(**places, head_map=head_map, mask=mask)


def _check_head_map(head_map: Tensor, formula: EntryFormula | LogarithmFormula) -> None:
    checks.check_floating(head_map=head_map)
    checks.require(
        (torch.isfinite(head_map) & (head_map >= 0)).all(),
        lambda: UsageError(
            "head_map must be finite and not negative.", found=f"a smallest weight of {float(head_map.min())}"
        ),
    )
    sums = head_map.double().sum(-1)
    checks.require(
        (sums != 0).all(),
        lambda: UsageError(
            "head_map leaves a student head without a teacher.",
            found=f"row {int((sums == 0).nonzero()[0])} is zero",
            allowed="a positive weight in every row",
        ),
    )
    if isinstance(formula, LogarithmFormula) and formula.with_entropy:
        wrong = (sums - 1).abs() > SUM_TOLERANCE
        checks.require(~wrong.any(), lambda: _not_a_distribution(formula.name, sums, int(wrong.nonzero()[0])))


def _not_a_distribution(distance: str, sums: Tensor, row: int) -> UsageError:
    return UsageError(
        f"{distance} compares distributions: each row of head_map must sum to 1.",
        found=f"row {row} sums to {float(sums[row]):.4g}",
        fix="divide each row by its sum, or use distance='cross_entropy'",
    )


def _check_support(student: Mixing, teacher: Mixing, formula: LogarithmFormula, valid_mask: Tensor) -> None:
    """Raise UsageError unless both are softmaxes and the student sees whatever the teacher sees."""
    if not (isinstance(student, SoftmaxMixing) and isinstance(teacher, SoftmaxMixing)):
        raise UsageError(
            f"{formula.name} compares softmax attention with softmax attention.",
            found=f"teacher {teacher.kind}, student {student.kind}",
            fix="use distance='cosine', which any pair has",
        )
    if formula.with_entropy and teacher.sinks is not None:
        raise UsageError(
            f"{formula.name} compares distributions, and the rows of a teacher with sinks do not sum to 1.",
            fix="use distance='cross_entropy', whose gradient is the same, or 'cosine'",
        )
    for found, sees_it in _sees_all(student, teacher, valid_mask):
        error = partial(_hidden, formula.name, found)
        if isinstance(sees_it, Tensor):
            checks.require(sees_it, error)
        elif not sees_it:
            raise error()


def _hidden(distance: str, found: str) -> UsageError:
    return UsageError(
        f"{distance} is infinite: the student does not see all that the teacher attends to.",
        found=found,
        allowed="a student that sees at least as far",
        fix="narrow the teacher's mixing, or use distance='cosine'",
    )


def _sees_all(
    student: SoftmaxMixing, teacher: SoftmaxMixing, valid_mask: Tensor
) -> Iterator[tuple[str, bool | Tensor]]:
    """Yield what the student may fail to see, and true (a boolean, or a boolean scalar) if it sees it."""
    yield "a causal student and a teacher that is not", teacher.causal or not student.causal
    window = min(teacher.window or teacher.time, teacher.time)
    yield (
        f"a window of {student.window} in the student, of {teacher.window or 'any length'} in the teacher",
        student.window is None or student.window >= window,
    )
    used = valid_mask.any(1)
    if student.valid_range is None:
        return
    start, stop = (0, teacher.time) if teacher.valid_range is None else teacher.valid_range.unbind(1)
    yield "a sequence that starts later for the student", ~((student.valid_range[:, 0] > start) & used).any()
    if not teacher.causal:
        yield "a sequence that stops earlier for the student", ~((student.valid_range[:, 1] < stop) & used).any()
