"""Means, intervals and paired differences of recipes against numbers by hand, and the table of strategies."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.recipes.statistics import Interval, mean_interval, paired
from benchmarks.recipes.tables import comparisons, shown, table, verdict


def test_three_values_have_a_t_interval_of_two_degrees_of_freedom() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    # Mean 2, standard deviation 1, standard error 1/√3.
    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(4.303 / math.sqrt(3))
    assert not found.is_above_zero and not found.is_below_zero


def test_two_values_and_one() -> None:
    found = mean_interval([1.0, 3.0])
    # Standard deviation √2, standard error 1.
    assert (found.mean, found.count) == (2.0, 2) and found.half == pytest.approx(12.706)
    assert mean_interval([5.0]) == Interval(mean=5.0, half=None, count=1)


def test_differences_are_paired_by_seed_and_seeds_of_one_arm_are_left_out() -> None:
    found = paired({0: 1.0, 1: 11.0, 2: 5.0}, {1: 10.5, 0: 0.4, 3: 7.0})
    # 0.6 and 0.5: standard deviation 0.1/√2, standard error 0.05.
    assert found is not None and found.count == 2
    assert found.mean == pytest.approx(0.55) and found.half == pytest.approx(12.706 * 0.05)
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("mean", "half", "expected"),
    [
        (-0.2, 0.1, "better, beyond the interval"),
        (-0.2, 0.3, "no difference beyond the interval"),
        (0.2, 0.1, "worse, beyond the interval"),
        (-0.2, None, "one seed alone"),
    ],
)
def test_the_verdict_on_a_difference(mean: float, half: float | None, expected: str) -> None:
    assert verdict(Interval(mean=mean, half=half, count=3)) == expected


def test_a_mean_is_shown_with_its_half_width() -> None:
    assert shown(Interval(mean=0.12345, half=0.0567, count=3)) == "+0.123 ± 0.057"
    assert shown(Interval(mean=-1.0, half=None, count=1)) == "-1.000"


def _arm(name: str, group: str, *references: str, as_long_as: str | None = None) -> dict[str, Any]:
    stage = {"name": "distil", "steps": 2, "batch_size": 2, "optimizer": {"lr": 0.1}}
    return {
        "name": name,
        "group": group,
        "title": f"title of {name}",
        "references": list(references),
        "as_long_as": as_long_as,
        "seconds": 1.0,
        "tokens": 1024,
        "mapping": {"stages": [stage]},
    }


@pytest.fixture
def result() -> dict[str, Any]:
    """Two seeds of four arms, one of which ran longer; a hybrid's arm was not run."""
    gaps = {"fresh-logits": (3.0, 4.0), "fresh-random": (3.5, 4.6), "fresh-uniform": (2.0, 3.0)}
    gaps["fresh-logits-as-long"] = (2.5, 3.4)
    return {
        "environment": {
            "versions": {"torch": "1"},
            "revision": {"commit": "abc"},
            "device": "a CPU",
            "threads": 1,
        },
        "measured_tokens": 100,
        "probe": {"fresh-logits": [{"teacher_seconds": 0.5, "student_seconds": 0.25}]},
        "arms": [
            _arm("fresh-logits", "fresh"),
            _arm("fresh-random", "fresh", "fresh-logits"),
            _arm("fresh-uniform", "fresh", "fresh-logits", "fresh-random"),
            _arm("fresh-logits-as-long", "fresh", "fresh-logits", as_long_as="fresh-uniform"),
            _arm("replaced-4-attention-output", "replaced-4"),
            _arm("replaced-15-attention-output", "replaced-15"),
        ],
        "runs": [{"arm": arm, "seed": seed, "gap": gap} for arm, both in gaps.items() for seed, gap in enumerate(both)],
    }


def test_an_arm_is_compared_at_equal_tokens_and_with_the_longer_run_of_its_reference(result: dict[str, Any]) -> None:
    found = {(row["arm"], row["reference"]): (row["equal"], row["mean"]) for row in comparisons(result)}
    assert found == {
        ("fresh-random", "fresh-logits"): ("tokens", pytest.approx(0.55)),
        ("fresh-random", "fresh-logits-as-long"): ("wall time", pytest.approx(1.1)),
        ("fresh-uniform", "fresh-logits"): ("tokens", pytest.approx(-1.0)),
        ("fresh-uniform", "fresh-random"): ("tokens", pytest.approx(-1.55)),
        ("fresh-uniform", "fresh-logits-as-long"): ("wall time", pytest.approx(-0.45)),
        ("fresh-logits-as-long", "fresh-logits"): ("arm, longer", pytest.approx(-0.55)),
    }


def test_the_table_has_a_verdict_on_each_map_against_the_control(result: dict[str, Any]) -> None:
    written = table(result)
    # -1.5 and -1.6: standard error 0.05.
    assert "- `uniform`: better, beyond the interval (-1.550 ± 0.635, 2 seeds)." in written
    assert "`random`" not in written and "`cka`" not in written
    assert "| title of replaced-4-attention-output | 1,024 | 1 | - | not run |" in written
    assert "| fresh | title of fresh-logits | distil | 0.50 | 0.25 |" in written
