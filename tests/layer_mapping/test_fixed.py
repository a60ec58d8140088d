from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping import STRATEGIES, explicit, replaced, same, uniform


def test_same_pairs_equal_indices() -> None:
    assert same(3, 3) == ((0, 0), (1, 1), (2, 2))


def test_same_refuses_unequal_depths() -> None:
    with pytest.raises(UsageError, match=r"3 student blocks, 4 teacher blocks[\s\S]*layers: uniform"):
        same(3, 4)


def test_replaced_pairs_only_the_replaced_blocks() -> None:
    assert replaced(30, 30, (27, 6)) == ((6, 6), (27, 27))


def test_replaced_without_a_replaced_block_is_an_error() -> None:
    with pytest.raises(UsageError, match="no mixer of the student was replaced"):
        replaced(4, 4, ())


# 1-based in the literature: 6 of 12 gives 2, 4, …, 12; 16 of 28 gives 2, 4, 6, 7, 9, 11, 13, 14, 16, …, 28.
@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (6, 12, [2, 4, 6, 8, 10, 12]),
        (16, 28, [2, 4, 6, 7, 9, 11, 13, 14, 16, 18, 20, 21, 23, 25, 27, 28]),
        (1, 5, [5]),
        (4, 2, [1, 1, 2, 2]),
    ],
)
def test_uniform_is_the_end_aligned_map(student: int, teacher: int, expected: list[int]) -> None:
    assert uniform(student, teacher) == tuple((index, block - 1) for index, block in enumerate(expected))


@given(st.integers(1, 200), st.integers(1, 200))
def test_uniform_stays_in_range_never_goes_back_and_ends_together(student: int, teacher: int) -> None:
    chosen = [block for _, block in uniform(student, teacher)]
    assert chosen == sorted(chosen)
    assert chosen[0] >= 0 and chosen[-1] == teacher - 1
    if student <= teacher:
        assert len(set(chosen)) == student


def test_uniform_of_equal_depths_is_same() -> None:
    assert uniform(7, 7) == same(7, 7)


def test_uniform_refuses_a_model_without_blocks() -> None:
    with pytest.raises(UsageError, match="at least one block"):
        uniform(0, 4)


def test_explicit_keeps_the_given_order() -> None:
    assert explicit([(1, 3), (0, 0)], 2, 4) == ((1, 3), (0, 0))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(2, 0)], r"student layer out of range: 2[\s\S]*a student of 2 blocks[\s\S]*0 to 1"),
        ([(0, 4), (1, -1)], r"teacher layer out of range: -1, 4[\s\S]*0 to 3"),
        ([(0, 1), (0, 1)], r"given twice: \(0, 1\)"),
    ],
)
def test_explicit_refuses_what_does_not_fit(pairs: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        explicit(pairs, 2, 4)


def test_every_strategy_is_in_the_table() -> None:
    assert {name: pairs(2, 2, (1,)) for name, pairs in STRATEGIES.items()} == {
        "same": ((0, 0), (1, 1)),
        "replaced": ((1, 1),),
        "uniform": ((0, 0), (1, 1)),
    }
