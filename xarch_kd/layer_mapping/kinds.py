"""Layer map by kind of mixer: attention, recurrent, or neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping.counts import OTHERWISE, uniform_targets
from xarch_kd.layer_mapping.layer_map import LayerMap, check_depths

# A layer without a token mixer, e.g. an MLP layer.
UNMIXED: Final = "other"


def type_aware(student_kinds: Sequence[str], teacher_kinds: Sequence[str]) -> LayerMap:
    """Map attention layers to attention layers, and each recurrent layer to the nearest recurrent one.

    Attention layers are paired among themselves as by `uniform`. A recurrent layer (any kind but `attention` and
    `other`) is mapped to the teacher's recurrent layer of nearest relative depth, (i + 1) / S against (j + 1) / T,
    ties to the later one; if the teacher has no recurrent layer, to the nearest attention layer. Layers without a
    token mixer (`other`) are mapped to the nearest such layer, or are not matched if there is none.

    Raises UsageError if only the student has attention, or only the student has token mixers.
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
    student, teacher = (_counted(kinds) for kinds in (student_kinds, teacher_kinds))
    raise UsageError(
        f"layers: type_aware has no teacher layer for student layer {layer} ({student_kinds[layer]})",
        found=f"a student with layers of {student}; a teacher with layers of {teacher}",
        allowed="a teacher with attention for a student with attention, with any mixer of tokens for recurrent layers",
        fix=OTHERWISE,
    )


def _counted(kinds: Sequence[str]) -> str:
    return ", ".join(f"{kind} ({count})" for kind, count in Counter(kinds).items())
