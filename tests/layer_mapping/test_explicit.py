from __future__ import annotations

import pytest

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping import explicit
from xarch_kd.layer_mapping.explicit import Pair


def test_layers_in_no_pair_are_not_matched() -> None:
    layer_map = explicit([(1, 3), (0, 0)], 3, 4)
    assert layer_map.pairs() == ((0, 0, 1.0), (1, 3, 1.0))
    assert layer_map.weights.sum(1).tolist() == [1, 1, 0]


def test_many_teacher_layers_share_one_student_layer() -> None:
    assert explicit([(0, 1), (0, 3)], 1, 4).pairs() == ((0, 1, 0.5), (0, 3, 0.5))
    assert explicit([(0, 1, 3.0), (0, 3, 1.0), (1, 3, 7.0)], 2, 4).pairs() == ((0, 1, 0.75), (0, 3, 0.25), (1, 3, 1.0))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "the list of pairs is empty"),
        ([(2, 0)], r"student layer out of range: 2[\s\S]*a student of 2 layers[\s\S]*0 to 1"),
        ([(0, 4), (1, -1)], r"teacher layer out of range: -1, 4[\s\S]*0 to 3"),
        ([(0, 1), (0, 1)], r"given twice: \(0, 1\)"),
        ([(0, 1, 1.0), (1, 1), (0, 1, 2.0)], r"given twice: \(0, 1\)"),
        ([(0, 1, -1.0)], r"the weight of the layer pair \(student, teacher\) \(0, 1\)[\s\S]*-1"),
        ([(0, 1, 0.0)], "not above 0"),
        ([(0, 1, float("nan"))], "found: +nan"),
        ([(0, 1, float("inf"))], "found: +inf"),
    ],
)
def test_what_does_not_fit_is_refused(pairs: list[Pair], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        explicit(pairs, 2, 4)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one layer"):
        explicit([(0, 0)], 0, 4)
