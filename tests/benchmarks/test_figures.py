"""Ratios, bounds and growths, from made-up measurements."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks.case import Bound, Case, Growth
from benchmarks.cases.projected_distance import CASES
from benchmarks.figures import grown, judge, record
from benchmarks.measure import Found

SIZES = {"tokens": 10, "student_width": 3, "teacher_width": 5}
ERRORS: dict[str, Any] = {"sizes": SIZES, "value": 1e-7, "gradients": {"student": 2e-7, "weight": 3e-7}}


def seen(seconds: list[float], peak: int) -> Found:
    return Found(memory={"peak_bytes": peak, "method": "made up"}, seconds=seconds, errors=ERRORS)


def case(*bounds: Bound) -> Case:
    return dataclasses.replace(CASES[0], bounds=bounds)


FOUND = {
    "naive": seen([1.0, 2.0, 4.0], 1000),
    "streaming": seen([0.5, 1.0, 8.0], 200),
    "fused": Found(missing="needs a GPU"),
}


def judged(*bounds: Bound, found: dict[str, Found] = FOUND) -> list[dict[str, Any]]:
    one = case(*bounds)
    result = record(one, SIZES, found, {"flops": 900.0, "bandwidth": 1e9})
    return judge(one.bounds, found, result)


def test_ratios_are_of_the_same_round() -> None:
    result = record(case(), SIZES, FOUND, {"flops": 900.0, "bandwidth": 1e9})
    streaming = result["contenders"]["streaming"]
    # 0.5/1, 1/2 and 8/4; the ratio of the medians would be 0.5 as well, of the means 1.36.
    assert streaming["ratios"]["time"] == {"median": 0.5, "low": 0.5, "high": 2.0}
    assert streaming["ratios"]["memory"] == 0.2
    assert streaming["seconds"] == {"median": 1.0, "low": 0.5, "high": 8.0}
    assert result["contenders"]["fused"] == {"source": "xarch_kd", "missing": "needs a GPU"}


def test_the_share_of_the_roofline_takes_the_slower_of_arithmetic_and_traffic() -> None:
    # 6 * 10 * 3 * 5 = 900 FLOP; (2 * 10 * 3 + 10 * 5 + 2 * 5 * 3) * 4 = 560 bytes.
    slow_arithmetic = record(case(), SIZES, FOUND, {"flops": 1800.0, "bandwidth": 1e9})
    assert slow_arithmetic["roofline"]["floor_seconds"] == 0.5
    assert slow_arithmetic["contenders"]["naive"]["roofline_share"] == 0.25
    slow_memory = record(case(), SIZES, FOUND, {"flops": 1e9, "bandwidth": 1120.0})
    assert slow_memory["roofline"]["floor_seconds"] == 0.5


@pytest.mark.parametrize(
    ("bound", "measured", "met"),
    [
        (Bound(contender="streaming", measure="time", at_most=0.5), 0.5, True),
        (Bound(contender="streaming", measure="time", at_most=0.49), 0.5, False),
        (Bound(contender="streaming", measure="memory", at_most=0.2), 0.2, True),
        (Bound(contender="streaming", measure="memory", at_most=0.19), 0.2, False),
        (Bound(contender="streaming", measure="roofline", at_least=0.9), 1.0, True),
        (Bound(contender="naive", measure="roofline", at_least=0.9), 0.5, False),
        (Bound(contender="naive", measure="memory", at_most=1.0, against="streaming"), 5.0, False),
    ],
)
def test_bounds_are_judged(bound: Bound, measured: float, met: bool) -> None:
    (row,) = judged(bound)
    assert row["measured"] == pytest.approx(measured)
    assert row["met"] is met


def test_what_cannot_be_measured_misses_its_bound_but_an_absent_peer_does_not() -> None:
    own = Bound(contender="fused", measure="time", at_most=1.0)
    peer = Bound(contender="streaming", measure="time", at_most=1.0, against="fused")
    left_out = Bound(contender="reference", measure="time", at_most=1.0)
    rows = judged(own, peer, left_out)
    assert [row["met"] for row in rows] == [False, None, None]
    assert rows[0]["why"] == "needs a GPU"
    assert rows[1]["why"] == "fused: needs a GPU"


def test_a_comparison_with_another_revision_is_kept_beside() -> None:
    found = {**FOUND, "streaming @ before": seen([1.0, 1.0, 2.0], 400)}
    result = record(case(), SIZES, found, {"flops": 900.0, "bandwidth": 1e9})
    assert result["contenders"]["streaming"]["ratios_to_before"] == {
        "time": {"median": 1.0, "low": 0.5, "high": 4.0},
        "memory": 0.5,
    }
    assert "ratios_to_before" not in result["contenders"]["naive"]


@pytest.mark.parametrize(("power", "met"), [(1, True), (2, False)])
def test_growth_is_the_slope_of_the_logarithms(power: int, met: bool) -> None:
    results = []
    for tokens, speed in ((8, 1.0), (16, 0.25), (64, 0.5)):
        found = {"naive": FOUND["naive"], "streaming": seen([3.0 * tokens**power / speed], tokens)}
        one = dataclasses.replace(case(), axis="tokens")
        # The machine was slower while the larger ones ran.
        roof = {"flops": 1.0, "bandwidth": 1.0, "rounds": [{"flops": speed, "bandwidth": speed}]}
        results.append(record(one, {**SIZES, "tokens": tokens}, found, roof))
    growth = Growth(group=CASES[0].group, contender="streaming", measure="time", at_most=1.2)
    row = grown(growth, results)
    assert row["measured"] == pytest.approx(power)
    assert row["met"] is met
    assert grown(growth, results[:2])["met"] is None
