"""Maps between unequal counts of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xarch_kd.errors import UsageError
from xarch_kd.projectors import head_map


def test_equal_counts_need_no_map() -> None:
    assert [head_map(rule, 3, 3) for rule in ("auto", "mean", "repeat")] == [None] * 3


@pytest.mark.parametrize("rule", ["auto", "mean"])
def test_a_student_head_learns_from_the_mean_of_a_group(rule: str) -> None:
    found = head_map(rule, 2, 4)
    assert found is not None
    assert torch.equal(found, torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]))


@pytest.mark.parametrize("rule", ["auto", "repeat"])
def test_a_teacher_head_teaches_a_group(rule: str) -> None:
    found = head_map(rule, 4, 2)
    assert found is not None
    assert torch.equal(found, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))


def test_weights_as_written_are_made_to_sum_to_one() -> None:
    found = head_map([[0.333, 0.333, 0.333]], 1, 3)
    assert found is not None
    assert torch.allclose(found, torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize(
    ("rule", "counts", "message"),
    [
        ("auto", (4, 6), "do not allow this rule"),
        ("mean", (4, 2), "do not allow this rule"),
        ("repeat", (2, 4), "do not allow this rule"),
        ("maen", (2, 4), "Did you mean 'mean'"),
        ([[1.0, 0.0]], (2, 2), "1 rows of 2 weights"),
        ([[1.0], [0.5, 0.5]], (2, 2), "2 rows of 1, 2 weights"),
        ([[1.0, 0.0], [0.0, 0.0]], (2, 2), "row 1 sums to 0"),
        ([[1.5, -0.5], [0.0, 1.0]], (2, 2), "must not be negative"),
    ],
)
def test_what_does_not_fit_is_an_error(rule: Any, counts: tuple[int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        head_map(rule, *counts)
