"""Layer maps known before training. Each gives pairs (student block, teacher block), both counted from 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xarch_kd.errors import UsageError

Pairs = tuple[tuple[int, int], ...]


def same(student_layers: int, teacher_layers: int, replaced_layers: Sequence[int] = ()) -> Pairs:
    """Return block i to block i. Raises `UsageError` when the depths differ."""
    _equal_depth("same", student_layers, teacher_layers)
    return tuple((layer, layer) for layer in range(student_layers))


def replaced(student_layers: int, teacher_layers: int, replaced_layers: Sequence[int] = ()) -> Pairs:
    """Return block i to block i for the blocks whose mixer was replaced.

    Raises `UsageError` when the depths differ or no mixer was replaced.
    """
    _equal_depth("replaced", student_layers, teacher_layers)
    if not replaced_layers:
        raise UsageError(
            "layers: replaced pairs nothing, because no mixer of the student was replaced",
            allowed="same | uniform | a list of {student, teacher} pairs",
        )
    return explicit([(layer, layer) for layer in sorted(replaced_layers)], student_layers, teacher_layers)


def uniform(student_layers: int, teacher_layers: int, replaced_layers: Sequence[int] = ()) -> Pairs:
    """Return student block i to teacher block ⌈(i+1)·T/S⌉ - 1, for S student and T teacher blocks.

    The last student block learns from the last teacher block, and the map never goes back. For S dividing T this is
    the map g(i) = i·T/S of TinyBERT (Jiao et al. 2020, section 4.3), counted from 0.
    """
    if student_layers < 1 or teacher_layers < 1:
        raise UsageError(
            "layers: uniform needs at least one block on both sides", found=(student_layers, teacher_layers)
        )
    return tuple((layer, -(-(layer + 1) * teacher_layers // student_layers) - 1) for layer in range(student_layers))


def explicit(pairs: Sequence[tuple[int, int]], student_layers: int, teacher_layers: int) -> Pairs:
    """Return `pairs` as they are. Raises `UsageError` for a block out of range or a pair given twice."""
    for side, index, count in (("student", 0, student_layers), ("teacher", 1, teacher_layers)):
        outside = sorted({pair[index] for pair in pairs if not 0 <= pair[index] < count})
        if outside:
            raise UsageError(
                f"{side} layer out of range: {', '.join(map(str, outside))}",
                found=f"a {side} of {count} blocks",
                allowed=f"0 to {count - 1}",
            )
    twice = sorted({pair for pair in pairs if list(pairs).count(pair) > 1})
    if twice:
        raise UsageError(f"layer pairs (student, teacher) given twice: {', '.join(map(str, twice))}")
    return tuple((student, teacher) for student, teacher in pairs)


def _equal_depth(strategy: str, student_layers: int, teacher_layers: int) -> None:
    if student_layers != teacher_layers:
        raise UsageError(
            f"layers: {strategy} needs as many student blocks as teacher blocks",
            found=f"{student_layers} student blocks, {teacher_layers} teacher blocks",
            fix="layers: uniform, or a list of {student, teacher} pairs",
        )


STRATEGIES: dict[str, Callable[[int, int, Sequence[int]], Pairs]] = {
    "same": same,
    "replaced": replaced,
    "uniform": uniform,
}
