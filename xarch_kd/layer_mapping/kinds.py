"""Layer maps that the kinds of the mixers decide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping.counts import OTHERWISE, uniform_targets
from xarch_kd.layer_mapping.layer_map import LayerMap, check_depths

# A block that mixes no tokens, e.g. one that is an MLP alone.
UNMIXED: Final = "other"


def type_aware(student_kinds: Sequence[str], teacher_kinds: Sequence[str]) -> LayerMap:
    """Return attention to attention, and each recurrent block to the nearest in depth, by the kinds of both's mixers.

    The a-th attention block learns from the teacher's attention block at the same fraction of those there are, as
    `uniform` would pair them. A recurrent block (any kind but `attention` and `other`) learns from the teacher's
    recurrent block that is nearest in depth, (i + 1) / S against (j + 1) / T, the later of two; of a teacher without
    recurrent blocks, from the nearest attention block. Blocks that mix no tokens (`other`) learn from the nearest such
    block, if there is one, else they have no match.

    Raises UsageError for attention in the student alone, and for a teacher with no block that mixes tokens when the
    student has one.
    """
    check_depths("type_aware", len(student_kinds), len(teacher_kinds))
    roles = [_role(kind) for kind in teacher_kinds]
    places = {role: [layer for layer, own in enumerate(roles) if own == role] for role in set(roles)}
    attending = [layer for layer, kind in enumerate(student_kinds) if _role(kind) == "attention"]
    candidates = {
        "attention": places.get("attention", []),
        "recurrent": places.get("recurrent") or places.get("attention", []),
    }
    for layer, kind in enumerate(student_kinds):
        if _role(kind) != UNMIXED and not candidates[_role(kind)]:
            _refuse(layer, student_kinds, teacher_kinds)
    targets: list[int | None] = [
        _nearest(layer, len(student_kinds), candidates.get(_role(kind), places.get(UNMIXED, [])), len(teacher_kinds))
        for layer, kind in enumerate(student_kinds)
    ]
    for ordinal, layer in zip(uniform_targets(len(attending), len(candidates["attention"])), attending, strict=True):
        targets[layer] = candidates["attention"][ordinal]
    if all(target is None for target in targets):
        _refuse(0, student_kinds, teacher_kinds)
    return LayerMap.from_targets("type_aware", targets, len(teacher_kinds))


def _role(kind: str) -> str:
    return kind if kind in ("attention", UNMIXED) else "recurrent"


def _nearest(layer: int, student_layers: int, among: Sequence[int], teacher_layers: int) -> int | None:
    def distance(other: int) -> tuple[int, int]:
        return abs((layer + 1) * teacher_layers - (other + 1) * student_layers), -other

    return min(among, key=distance, default=None)


def _refuse(layer: int, student_kinds: Sequence[str], teacher_kinds: Sequence[str]) -> None:
    student, teacher = (_told(kinds) for kinds in (student_kinds, teacher_kinds))
    raise UsageError(
        f"layers: type_aware has no teacher block for student block {layer} ({student_kinds[layer]})",
        found=f"a student with blocks of {student}; a teacher with blocks of {teacher}",
        allowed="a teacher with attention for a student with attention, with any mixer of tokens for recurrent blocks",
        fix=OTHERWISE,
    )


def _told(kinds: Sequence[str]) -> str:
    return ", ".join(f"{kind} ({count})" for kind, count in Counter(kinds).items())
