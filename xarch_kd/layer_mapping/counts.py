"""Layer maps that follow from the two depths alone: S student layers and T teacher layers, counted from 0.

All arithmetic is on integers: rounding floating-point fractions would shift some layers by one for some depths.
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
    """Map layer i to layer i. Raises UsageError if the depths differ."""
    _equal_depth("same", student_layers, teacher_layers)
    return LayerMap.from_targets("same", range(student_layers), teacher_layers)


def replaced(student_layers: int, teacher_layers: int, *, replaced_layers: Sequence[int]) -> LayerMap:
    """Map layer i to layer i for the layers whose mixer was replaced; the other layers are not matched.

    Raises UsageError if the depths differ, no mixer was replaced, or a layer is out of range.
    """
    _equal_depth("replaced", student_layers, teacher_layers)
    if not replaced_layers:
        raise UsageError(
            "layers: replaced gives no pairs, because no mixer of the student was replaced",
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
    """Map student layer i to teacher layer ⌈(i + 1) T / S⌉ - 1: evenly spaced, last layers aligned.

    The map is monotone, and the last student layer learns from the last teacher layer. If S divides T this is the
    map g(i) = i·T/S of TinyBERT (Jiao et al. 2020, section 4.3), counted from 0.
    """
    check_depths("uniform", student_layers, teacher_layers)
    return LayerMap.from_targets("uniform", uniform_targets(student_layers, teacher_layers), teacher_layers)


def uniform_endpoints(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map student layer i to the teacher layer nearest to i (T - 1) / (S - 1), halves up: both ends aligned.

    The symmetric uniform map of DistillKit. A single student layer learns from the last teacher layer.
    """
    check_depths("uniform_endpoints", student_layers, teacher_layers)
    steps = student_layers - 1
    targets = [(2 * layer * (teacher_layers - 1) + steps) // (2 * steps) for layer in range(student_layers) if steps]
    return LayerMap.from_targets("uniform_endpoints", targets or [teacher_layers - 1], teacher_layers)


def uniform_begin(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map student layer i to teacher layer ⌊i T / S⌋: evenly spaced, first layers aligned.

    The last teacher layer is not used unless S >= T. If S divides T this is the common i·(T // S), which would skip
    the teacher's upper layers for other depths.
    """
    check_depths("uniform_begin", student_layers, teacher_layers)
    targets = [layer * teacher_layers // student_layers for layer in range(student_layers)]
    return LayerMap.from_targets("uniform_begin", targets, teacher_layers)


def first(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map layer i to layer i and leave out the teacher's upper layers. Raises UsageError for S > T."""
    check_placeable("first", student_layers, teacher_layers)
    return LayerMap.from_targets("first", range(student_layers), teacher_layers)


def last(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map student layer i to teacher layer T - S + i. Raises UsageError for S > T."""
    check_placeable("last", student_layers, teacher_layers)
    return LayerMap.from_targets("last", range(teacher_layers - student_layers, teacher_layers), teacher_layers)


def every(student_layers: int, teacher_layers: int, *, k: int) -> LayerMap:
    """Map student layer i to teacher layer (i + 1) k - 1: every k-th teacher layer.

    Raises UsageError unless 1 <= k <= T // S.
    """
    check_placeable("every", student_layers, teacher_layers)
    most = teacher_layers // student_layers
    if not _whole(k) or not 1 <= k <= most:
        raise UsageError(
            "layers: every cannot place all student layers k teacher layers apart",
            asked=f"k: {k}",
            found=f"{student_layers} student layers, {teacher_layers} teacher layers",
            allowed=f"1 to {most}" if most > 1 else "1",
        )
    targets = [(layer + 1) * k - 1 for layer in range(student_layers)]
    return LayerMap.from_targets("every", targets, teacher_layers)


def block_average(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map student layer i to the mean of the teacher layers between the `uniform` targets of i - 1 (excluded) and i.

    For the residual stream (`hidden`) the mean is a smoothed end of that range. For outputs that are added to the
    stream (of mixers and MLPs) a student layer replaces the sum over its range: scale its target by the number of
    layers.

    Raises UsageError for S > T, where some range would be empty.
    """
    check_placeable("block_average", student_layers, teacher_layers)
    weights = torch.zeros(student_layers, teacher_layers, dtype=torch.float64)
    begin = 0
    for student, target in enumerate(uniform_targets(student_layers, teacher_layers)):
        weights[student, begin : target + 1] = 1 / (target + 1 - begin)
        begin = target + 1
    return LayerMap("block_average", weights)


def reverse(student_layers: int, teacher_layers: int) -> LayerMap:
    """Map layers to the targets of `uniform` in reverse order, as a control."""
    check_depths("reverse", student_layers, teacher_layers)
    return LayerMap.from_targets("reverse", uniform_targets(student_layers, teacher_layers)[::-1], teacher_layers)


def all_to_one(student_layers: int, teacher_layers: int, *, teacher_layer: int | None = None) -> LayerMap:
    """Map every student layer to `teacher_layer`, by default the last, as a control.

    Raises UsageError for a layer that the teacher does not have.
    """
    check_depths("all_to_one", student_layers, teacher_layers)
    target = teacher_layers - 1 if teacher_layer is None else teacher_layer
    check_range("teacher", [target], teacher_layers)
    return LayerMap.from_targets("all_to_one", [target] * student_layers, teacher_layers)


def random(
    student_layers: int, teacher_layers: int, *, seed: int = 0, draw: int = 0, ordered: bool = False
) -> LayerMap:
    """Map each student layer to a teacher layer drawn without replacement, as a control.

    If S > T, each teacher layer is drawn once before any is drawn again. Each `draw` of a seed is a different map, so
    a map that is redrawn every n steps passes draw = step // n. `ordered` sorts the targets, as in RAIL-KD (Haidar et
    al. 2022).
    """
    check_depths("random", student_layers, teacher_layers)
    source = Random(f"{seed} {draw}")
    targets: list[int] = []
    while len(targets) < student_layers:
        targets += source.sample(range(teacher_layers), min(teacher_layers, student_layers - len(targets)))
    return LayerMap.from_targets("random", sorted(targets) if ordered else targets, teacher_layers)


def check_range(side: str, layers: Sequence[int], count: int) -> None:
    """Raise UsageError unless all `layers` exist in a model with `count` layers."""
    outside = sorted({layer for layer in layers if not 0 <= layer < count})
    if outside:
        raise UsageError(
            f"{side} layer out of range: {', '.join(map(str, outside))}",
            found=f"a {side} of {count} layers",
            allowed=f"0 to {count - 1}",
        )


def check_placeable(strategy: str, student_layers: int, teacher_layers: int, fix: str = OTHERWISE) -> None:
    """Raise UsageError if `strategy`, which uses each teacher layer at most once, has more student layers than that."""
    check_depths(strategy, student_layers, teacher_layers)
    if student_layers > teacher_layers:
        raise UsageError(
            f"layers: {strategy} cannot place more student layers than there are teacher layers",
            found=f"{student_layers} student layers, {teacher_layers} teacher layers",
            allowed=f"up to {teacher_layers} student layers",
            fix=fix,
        )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _equal_depth(strategy: str, student_layers: int, teacher_layers: int) -> None:
    check_depths(strategy, student_layers, teacher_layers)
    if student_layers != teacher_layers:
        raise UsageError(
            f"layers: {strategy} needs as many student layers as teacher layers",
            found=f"{student_layers} student layers, {teacher_layers} teacher layers",
            fix=OTHERWISE,
        )
