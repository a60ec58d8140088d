"""Layer maps that the depths alone decide. S and T are the student's and the teacher's blocks, counted from 0.

All arithmetic is of integers: rounding of floating-point fractions would move blocks by one for some depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

import torch

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping.layer_map import LayerMap, check_depths

OTHERWISE: Final = "layers: uniform, or a list of {student, teacher} pairs"


def same(student_layers: int, teacher_layers: int) -> LayerMap:
    """Return block i to block i. Raises UsageError when the depths differ."""
    _equal_depth("same", student_layers, teacher_layers)
    return LayerMap.from_targets("same", range(student_layers), teacher_layers)


def replaced(student_layers: int, teacher_layers: int, *, replaced_layers: Sequence[int]) -> LayerMap:
    """Return block i to block i for the blocks whose mixer was replaced; the others have no match.

    Raises UsageError when the depths differ, no mixer was replaced, or a block is out of range.
    """
    _equal_depth("replaced", student_layers, teacher_layers)
    if not replaced_layers:
        raise UsageError(
            "layers: replaced pairs nothing, because no mixer of the student was replaced",
            allowed="same | uniform | a list of {student, teacher} pairs",
        )
    check_range("student", replaced_layers, student_layers)
    chosen = set(replaced_layers)
    targets = [layer if layer in chosen else None for layer in range(student_layers)]
    return LayerMap.from_targets("replaced", targets, teacher_layers)


def uniform_targets(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Return ⌈(i + 1) T / S⌉ - 1 for each i < S."""
    return tuple(-(-(layer + 1) * teacher_layers // student_layers) - 1 for layer in range(student_layers))


def uniform(student_layers: int, teacher_layers: int) -> LayerMap:
    """Return student block i to teacher block ⌈(i + 1) T / S⌉ - 1: evenly spaced, the ends aligned.

    The last student block learns from the last teacher block, and the map never goes back. For S dividing T this is
    the map g(i) = i·T/S of TinyBERT (Jiao et al. 2020, section 4.3), counted from 0.
    """
    check_depths("uniform", student_layers, teacher_layers)
    return LayerMap.from_targets("uniform", uniform_targets(student_layers, teacher_layers), teacher_layers)


def uniform_endpoints(student_layers: int, teacher_layers: int) -> LayerMap:
    """Return student block i to the teacher block nearest to i (T - 1) / (S - 1), halves up: both ends aligned.

    The symmetric uniform map of DistillKit. A single student block learns from the last teacher block.
    """
    check_depths("uniform_endpoints", student_layers, teacher_layers)
    steps = student_layers - 1
    targets = [(2 * layer * (teacher_layers - 1) + steps) // (2 * steps) for layer in range(student_layers) if steps]
    return LayerMap.from_targets("uniform_endpoints", targets or [teacher_layers - 1], teacher_layers)


def uniform_begin(student_layers: int, teacher_layers: int) -> LayerMap:
    """Return student block i to teacher block ⌊i T / S⌋: evenly spaced, the beginnings aligned.

    The last teacher block is never used, unless S >= T. For S dividing T this is the usual i·(T // S); elsewhere that
    would leave out the teacher's upper blocks.
    """
    check_depths("uniform_begin", student_layers, teacher_layers)
    targets = [layer * teacher_layers // student_layers for layer in range(student_layers)]
    return LayerMap.from_targets("uniform_begin", targets, teacher_layers)


def first(student_layers: int, teacher_layers: int) -> LayerMap:
    """Return block i to block i, the teacher's upper blocks left out. Raises UsageError for S > T."""
    check_placeable("first", student_layers, teacher_layers)
    return LayerMap.from_targets("first", range(student_layers), teacher_layers)


def last(student_layers: int, teacher_layers: int) -> LayerMap:
    """Return student block i to teacher block T - S + i, the teacher's lower blocks left out. Raises for S > T."""
    check_placeable("last", student_layers, teacher_layers)
    return LayerMap.from_targets("last", range(teacher_layers - student_layers, teacher_layers), teacher_layers)


def every(student_layers: int, teacher_layers: int, *, k: int) -> LayerMap:
    """Return student block i to teacher block (i + 1) k - 1: the end of each k teacher blocks.

    Raises UsageError unless 1 <= k <= T // S.
    """
    check_placeable("every", student_layers, teacher_layers)
    most = teacher_layers // student_layers
    if not _whole(k) or not 1 <= k <= most:
        raise UsageError(
            "layers: every cannot place all student blocks k teacher blocks apart",
            asked=f"k: {k}",
            found=f"{student_layers} student blocks, {teacher_layers} teacher blocks",
            allowed=f"1 to {most}" if most > 1 else "1",
        )
    targets = [(layer + 1) * k - 1 for layer in range(student_layers)]
    return LayerMap.from_targets("every", targets, teacher_layers)


def block_average(student_layers: int, teacher_layers: int) -> LayerMap:
    """Return student block i to the mean of the teacher blocks after the target of i - 1, up to its own in `uniform`.

    For states that blocks add to (`hidden`), the mean is a smoothed end of that span. Of outputs that are added (those
    of mixers and MLPs), a student block stands for the sum of its span: scale its target by the number of blocks.

    Raises UsageError for S > T, where some span would be empty.
    """
    check_placeable("block_average", student_layers, teacher_layers)
    weights = torch.zeros(student_layers, teacher_layers, dtype=torch.float64)
    begin = 0
    for student, target in enumerate(uniform_targets(student_layers, teacher_layers)):
        weights[student, begin : target + 1] = 1 / (target + 1 - begin)
        begin = target + 1
    return LayerMap("block_average", weights)


def reverse(student_layers: int, teacher_layers: int) -> LayerMap:
    """Return the targets of `uniform` in reverse order: a control that no order of depth can explain."""
    check_depths("reverse", student_layers, teacher_layers)
    return LayerMap.from_targets("reverse", uniform_targets(student_layers, teacher_layers)[::-1], teacher_layers)


def all_to_one(student_layers: int, teacher_layers: int, *, teacher_layer: int | None = None) -> LayerMap:
    """Return every student block to `teacher_layer`, by default the last: a control.

    Raises UsageError for a block that the teacher lacks.
    """
    check_depths("all_to_one", student_layers, teacher_layers)
    target = teacher_layers - 1 if teacher_layer is None else teacher_layer
    check_range("teacher", [target], teacher_layers)
    return LayerMap.from_targets("all_to_one", [target] * student_layers, teacher_layers)


def random(
    student_layers: int, teacher_layers: int, *, seed: int = 0, draw: int = 0, ordered: bool = False
) -> LayerMap:
    """Return each student block to a teacher block drawn without replacement: a control.

    A student with more blocks gets all teacher blocks once before one is drawn again. Another `draw` of the same seed
    is another map, so a map that changes every n steps is draw = step // n. `ordered` sorts the targets, as RAIL-KD
    does (Haidar et al. 2022): random blocks in the right order.
    """
    check_depths("random", student_layers, teacher_layers)
    source = Random(f"{seed} {draw}")
    targets: list[int] = []
    while len(targets) < student_layers:
        targets += source.sample(range(teacher_layers), min(teacher_layers, student_layers - len(targets)))
    return LayerMap.from_targets("random", sorted(targets) if ordered else targets, teacher_layers)


def check_range(side: str, layers: Sequence[int], count: int) -> None:
    """Raise UsageError unless all `layers` are blocks of a model with `count` of them."""
    outside = sorted({layer for layer in layers if not 0 <= layer < count})
    if outside:
        raise UsageError(
            f"{side} layer out of range: {', '.join(map(str, outside))}",
            found=f"a {side} of {count} blocks",
            allowed=f"0 to {count - 1}",
        )


def check_placeable(strategy: str, student_layers: int, teacher_layers: int, fix: str = OTHERWISE) -> None:
    """Raise UsageError when `strategy`, which uses a teacher block once, has more student blocks than that."""
    check_depths(strategy, student_layers, teacher_layers)
    if student_layers > teacher_layers:
        raise UsageError(
            f"layers: {strategy} cannot place more student blocks than there are teacher blocks",
            found=f"{student_layers} student blocks, {teacher_layers} teacher blocks",
            allowed=f"up to {teacher_layers} student blocks",
            fix=fix,
        )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _equal_depth(strategy: str, student_layers: int, teacher_layers: int) -> None:
    check_depths(strategy, student_layers, teacher_layers)
    if student_layers != teacher_layers:
        raise UsageError(
            f"layers: {strategy} needs as many student blocks as teacher blocks",
            found=f"{student_layers} student blocks, {teacher_layers} teacher blocks",
            fix=OTHERWISE,
        )
