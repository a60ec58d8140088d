"""Weights over a stage: at its start, middle and end, and refused schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest

from xarch_kd.errors import UsageError
from xarch_kd.losses.schedules import SHAPES, WeightSchedule

QUARTER = (1 - math.cos(math.pi / 4)) / 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Factors at progress 0, 1/4, 1/2, 3/4 and 1.
        ({}, [1, 1, 1, 1, 1]),
        ({"kind": "constant", "initial": 0.5}, [0.5] * 5),
        ({"kind": "constant", "start": 0.25, "end": 0.75}, [0, 1, 1, 0, 0]),
        ({"kind": "constant", "start": 0.75}, [0, 0, 0, 1, 1]),
        ({"kind": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"kind": "linear", "initial": 0.0, "final": 2.0}, [0, 0.5, 1, 1.5, 2]),
        ({"kind": "linear", "start": 0.25, "end": 0.75}, [1, 1, 0.5, 0, 0]),
        ({"kind": "cosine"}, [1, 1 - QUARTER, 0.5, QUARTER, 0]),
        ({"kind": "cosine", "initial": 0.2, "final": 1.0, "end": 0.5}, [0.2, 0.6, 1, 1, 1]),
    ],
)
def test_factors(options: dict[str, Any], expected: list[float]) -> None:
    schedule = WeightSchedule(**options)
    assert [schedule.factor(at / 4) for at in range(5)] == pytest.approx(expected, abs=1e-15)


def test_windows_that_meet_share_no_step() -> None:
    first, second = WeightSchedule(end=0.3), WeightSchedule(start=0.3)
    assert all(first.factor(step / 10) + second.factor(step / 10) == 1 for step in range(10))


@pytest.mark.parametrize("kind", SHAPES)
def test_a_schedule_stays_between_its_ends(kind: str) -> None:
    schedule = WeightSchedule(kind=kind, start=1 / 3, end=0.5, initial=0.3, final=0.7)
    assert all(0 <= schedule.factor(step / 999) <= 0.7 for step in range(1000))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "linaer"}, "Did you mean 'linear'"),
        ({"start": -0.1}, "0 <= start < end <= 1"),
        ({"start": 0.5, "end": 0.5}, "start 0.5, end 0.5"),
        ({"end": 1.1}, "fractions of the stage"),
        ({"start": float("nan")}, "fractions of the stage"),
        ({"initial": -1.0}, "initial factor"),
        ({"final": float("inf")}, "final factor"),
    ],
)
def test_bad_schedules_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        WeightSchedule(**options)


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_of_the_stage_is_refused(progress: float) -> None:
    with pytest.raises(UsageError, match="share of the stage"):
        WeightSchedule().factor(progress)
