from __future__ import annotations

import pytest

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping.counts import uniform
from xarch_kd.layer_mapping.kinds import type_aware


def kinds(pattern: str) -> list[str]:
    names = {"A": "attention", "M": "mamba2", "D": "gated_delta", "-": "other"}
    return [names[letter] for letter in pattern]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # Equal types: layer i to layer i.
        ("MMAMMA", "MMAMMA", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5}),
        # A teacher of attention alone: recurrent layers at their own depth, ⌈(i + 1) · 2⌉ - 1; the one attention layer
        # is the last of its kind, so it learns from the last of the teacher's.
        ("MAM", "AAAAAA", {0: 1, 1: 5, 2: 5}),
        # Attention by ordinal: the first of two to the second of four.
        ("AMMA", "AMAMAMAM", {0: 2, 1: 3, 2: 5, 3: 6}),
        # Other recurrent kinds are accepted. Ties go to the later layer: 1/4 is as far from 1/6 as from 2/6.
        ("MMMM", "DADADA", {0: 0, 1: 2, 2: 4, 3: 4}),
        # 1/2 lies in the middle of 1/4 and 3/4: the later one.
        ("MM", "DADA", {0: 2, 1: 2}),
        # MLP layers: to such layers, if there are any.
        ("M-A-", "A-A-", {0: 0, 1: 1, 2: 2, 3: 3}),
        ("M-A-", "AAAA", {0: 0, 2: 3}),
        # More attention than the teacher has: shared, in order.
        ("AAAA", "MAMA", {0: 1, 1: 1, 2: 3, 3: 3}),
    ],
)
def test_layers_learn_from_layers_of_their_kind(student: str, teacher: str, expected: dict[int, int]) -> None:
    found = type_aware(kinds(student), kinds(teacher))
    assert {own: other for own, other, _ in found.pairs()} == expected
    assert found.weights.shape == (len(student), len(teacher))


def test_attention_alone_is_uniform() -> None:
    found = type_aware(["attention"] * 5, ["attention"] * 12)
    assert found.pairs() == uniform(5, 12).pairs()


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ("MMA", "MMMM", r"student layer 2 \(attention\)[\s\S]*mamba2 \(2\), attention \(1\)[\s\S]*mamba2 \(4\)"),
        ("MA", "--", r"student layer 0 \(mamba2\)"),
        ("--", "AA", r"student layer 0 \(other\)[\s\S]*layers: uniform"),
        ("", "AA", "at least one layer"),
    ],
)
def test_what_no_teacher_block_serves_is_refused(student: str, teacher: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        type_aware(kinds(student), kinds(teacher))
