from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping import LayerMap
from xarch_kd.layer_mapping.counts import (
    all_to_one,
    block_average,
    every,
    first,
    last,
    random,
    replaced,
    reverse,
    same,
    uniform,
    uniform_begin,
    uniform_endpoints,
)


def chosen(layer_map: LayerMap) -> list[int]:
    """Return the teacher layer of each student layer, all of weight 1."""
    pairs = layer_map.pairs()
    assert [student for student, _, _ in pairs] == list(range(layer_map.weights.shape[0]))
    assert all(weight == 1 for _, _, weight in pairs)
    return [teacher for _, teacher, _ in pairs]


def ending(student: int, teacher: int) -> list[int]:
    return [math.ceil(Fraction(place * teacher, student)) for place in range(1, student + 1)]


def endpoints(student: int, teacher: int) -> list[int]:
    if student == 1:
        return [teacher]
    exact = [Fraction((place - 1) * (teacher - 1), student - 1) + 1 for place in range(1, student + 1)]
    return [math.floor(place + Fraction(1, 2)) for place in exact]


def beginning(student: int, teacher: int) -> list[int]:
    return [math.floor(Fraction((place - 1) * teacher, student)) + 1 for place in range(1, student + 1)]


# The formulas of the literature count from 1, and here they are worked in exact fractions.
@pytest.mark.parametrize(
    ("strategy", "golden"), [(uniform, ending), (uniform_endpoints, endpoints), (uniform_begin, beginning)]
)
def test_every_depth_pair_up_to_40_by_80(
    strategy: Callable[[int, int], LayerMap], golden: Callable[[int, int], list[int]]
) -> None:
    for student in range(1, 41):
        for teacher in range(1, 81):
            weights = strategy(student, teacher).weights
            assert weights.sum().item() == student and int((weights != 0).sum()) == student
            assert (weights.argmax(1) + 1).tolist() == golden(student, teacher), (student, teacher)


@pytest.mark.parametrize(
    ("strategy", "student", "teacher", "expected"),
    [
        (uniform, 6, 12, [2, 4, 6, 8, 10, 12]),
        (uniform, 16, 28, [2, 4, 6, 7, 9, 11, 13, 14, 16, 18, 20, 21, 23, 25, 27, 28]),
        (uniform, 1, 5, [5]),
        (uniform, 4, 2, [1, 1, 2, 2]),
        (uniform_endpoints, 6, 12, [1, 3, 5, 8, 10, 12]),
        # Half-even rounding would give 2 for the middle one.
        (uniform_endpoints, 3, 4, [1, 3, 4]),
        (uniform_endpoints, 1, 5, [5]),
        (uniform_begin, 6, 12, [1, 3, 5, 7, 9, 11]),
        (uniform_begin, 4, 2, [1, 1, 2, 2]),
        (first, 3, 5, [1, 2, 3]),
        (last, 3, 5, [3, 4, 5]),
        (last, 3, 3, [1, 2, 3]),
        (reverse, 6, 12, [12, 10, 8, 6, 4, 2]),
        (same, 3, 3, [1, 2, 3]),
    ],
)
def test_maps_of_the_literature(
    strategy: Callable[[int, int], LayerMap], student: int, teacher: int, expected: list[int]
) -> None:
    assert [block + 1 for block in chosen(strategy(student, teacher))] == expected


@given(st.integers(1, 200), st.integers(1, 200))
def test_uniform_stays_in_range_never_goes_back_and_ends_together(student: int, teacher: int) -> None:
    found = chosen(uniform(student, teacher))
    assert found == sorted(found)
    assert found[0] >= 0 and found[-1] == teacher - 1
    if student <= teacher:
        assert len(set(found)) == student


def test_replaced_pairs_only_the_replaced_layers() -> None:
    assert replaced(30, 30, replaced_layers=(27, 6)).pairs() == ((6, 6, 1.0), (27, 27, 1.0))


def test_every_takes_the_end_of_each_k_layers() -> None:
    assert chosen(every(3, 12, k=2)) == [1, 3, 5]
    assert chosen(every(3, 12, k=1)) == [0, 1, 2]
    assert chosen(every(3, 12, k=4)) == chosen(uniform(3, 12))


def test_block_average_is_the_mean_of_spans_that_cut_the_teacher_up() -> None:
    # The ranges end at the targets of `uniform`: 16 of 28 layers end at 2, 4, 6, 7, …
    weights = block_average(16, 28).weights
    assert weights[0, :2].tolist() == [0.5, 0.5] and weights[3, 6].item() == 1
    assert torch.equal((weights > 0).sum(0), torch.ones(28, dtype=torch.int64))
    assert weights[2].sum().item() == 1
    assert block_average(1, 3).weights[0].tolist() == pytest.approx([1 / 3] * 3)


def test_all_to_one_is_the_last_unless_told() -> None:
    assert chosen(all_to_one(3, 5)) == [4, 4, 4]
    assert chosen(all_to_one(3, 5, teacher_layer=0)) == [0, 0, 0]


def test_random_is_without_replacement_and_reproducible() -> None:
    found = chosen(random(6, 12, seed=3))
    assert len(set(found)) == 6 and set(found) <= set(range(12))
    assert found == chosen(random(6, 12, seed=3))
    others = [chosen(random(6, 12, seed=4)), chosen(random(6, 12, seed=3, draw=1))]
    assert found not in others and others[0] != others[1]
    assert chosen(random(6, 12, seed=3, ordered=True)) == sorted(found)


def test_random_draws_of_one_seed_use_all_layers_equally() -> None:
    counts = torch.zeros(8)
    for draw in range(400):
        counts[chosen(random(2, 8, draw=draw))] += 1
    # 800 draws of 8 layers: 100 each, standard deviation sqrt(400 · 1/4 · 3/4) = 8.7, of which 5 are allowed.
    assert bool(((counts - 100).abs() < 44).all())


def test_random_of_a_deeper_student_uses_each_block_before_any_again() -> None:
    found = chosen(random(7, 3))
    assert sorted(found.count(block) for block in range(3)) == [2, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: same(3, 4), r"3 student layers, 4 teacher layers[\s\S]*layers: uniform"),
        (lambda: replaced(3, 4, replaced_layers=[0]), r"as many student layers[\s\S]*3 student layers, 4 teacher"),
        (lambda: replaced(4, 4, replaced_layers=()), "no mixer of the student was replaced"),
        (lambda: replaced(4, 4, replaced_layers=[4]), r"student layer out of range: 4[\s\S]*0 to 3"),
        (lambda: uniform(0, 4), r"at least one layer[\s\S]*0 student layers"),
        (lambda: uniform_endpoints(4, 0), "at least one layer"),
        (lambda: uniform_begin(0, 4), "at least one layer"),
        (lambda: reverse(0, 4), "at least one layer"),
        (lambda: random(2, 0), "at least one layer"),
        (lambda: all_to_one(2, 0), "at least one layer"),
        (lambda: same(0, 0), "at least one layer"),
        (lambda: first(5, 4), r"first cannot place[\s\S]*5 student layers, 4 teacher[\s\S]*up to 4[\s\S]*uniform"),
        (lambda: last(5, 4), "last cannot place"),
        (lambda: block_average(5, 4), "block_average cannot place"),
        (lambda: every(5, 4, k=1), "every cannot place more student layers"),
        (lambda: every(3, 12, k=5), r"k teacher layers apart[\s\S]*k: 5[\s\S]*1 to 4"),
        (lambda: every(3, 12, k=0), r"asked: +k: 0"),
        (lambda: every(3, 5, k=2), r"allowed: +1$"),
        (lambda: every(3, 12, k=True), "k: True"),
        (lambda: all_to_one(3, 5, teacher_layer=5), r"teacher layer out of range: 5[\s\S]*0 to 4"),
        (lambda: all_to_one(3, 5, teacher_layer=-1), "teacher layer out of range: -1"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], LayerMap], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
