"""Reported figures from measurements: medians, ratios of the same round, shares of the roofline, bounds."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.case import Bound, Case, Growth, Sizes
from benchmarks.measure import Found

Record = dict[str, Any]


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the least and the greatest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def record(case: Case, sizes: Sizes, found: dict[str, Found], roof: Record) -> Record:
    """Return the figures of a case in the form of the stored results."""
    flops, traffic = case.flops(sizes), case.bytes(sizes)
    floor = max(flops / roof["flops"], traffic / roof["bandwidth"])
    return {
        "case": case.name,
        "group": case.group,
        "axis": case.axis,
        "sizes": dict(sizes),
        "options": dict(case.options),
        "dtype": case.dtype,
        "seed": case.seed,
        "baseline": case.baseline,
        "whole": case.whole,
        "gradients": [name for name, one in case.inputs.items() if one.gradient],
        "flops": flops,
        "dense_flops": case.dense_flops(sizes) if case.dense_flops else None,
        "bytes": traffic,
        "roofline": {**roof, "floor_seconds": floor},
        "contenders": {name: contender(name, case, found, floor) for name in found},
    }


def contender(name: str, case: Case, found: dict[str, Found], floor: float) -> Record:
    """Return the figures of one contender."""
    one, baseline = found[name], found.get(case.baseline, Found())
    origin = case.contenders[name.split(" @ ")[0]]
    if one.missing is not None or one.memory is None or not one.seconds:
        return {"source": origin.source, "missing": one.missing or "not measured"}
    result: Record = {
        "source": origin.source,
        "truth": origin.truth or case.baseline,
        "seconds": spread(one.seconds),
        "rounds": one.seconds,
        "memory": one.memory,
        "roofline_share": floor / statistics.median(one.seconds),
        "errors": one.errors,
        "ratios": ratios(one, baseline),
    }
    before = found.get(f"{name} @ before")
    return result if before is None else {**result, "ratios_to_before": ratios(one, before)}


def ratios(one: Found, other: Found) -> Record | None:
    """Return time and memory over the other's, time round by round; None if either was not measured."""
    if one.missing is not None or other.missing is not None or not other.seconds:
        return None
    if one.memory is None or other.memory is None:
        return None
    rounds = [mine / its for mine, its in zip(one.seconds, other.seconds, strict=False)]
    return {"time": spread(rounds), "memory": one.memory["peak_bytes"] / max(1, other.memory["peak_bytes"])}


def judge(bounds: tuple[Bound, ...], found: dict[str, Found], result: Record) -> list[Record]:
    """Return each bound of a case with its measured value and `met` (None: nothing to compare with)."""
    return [_judged(bound, found, result) for bound in bounds]


def _judged(bound: Bound, found: dict[str, Found], result: Record) -> Record:
    against = bound.against or result["baseline"]
    mine = result["contenders"].get(bound.contender, {"missing": "not asked for"})
    row: Record = {
        "contender": bound.contender,
        "measure": bound.measure,
        "against": None if bound.measure == "roofline" else against,
        "at_most": bound.at_most,
        "at_least": bound.at_least,
        "measured": None,
        "met": None,
        "why": mine.get("missing"),
    }
    if "missing" in mine:
        # A contender that was chosen and cannot be measured does not meet its bound.
        return {**row, "met": None if mine["missing"] == "not asked for" else False}
    if bound.measure == "roofline":
        measured = mine["roofline_share"]
    else:
        compared = ratios(found[bound.contender], found.get(against, Found()))
        if compared is None:
            return {**row, "why": f"{against}: {found.get(against, Found()).missing or 'not asked for'}"}
        measured = compared["time"]["median"] if bound.measure == "time" else compared["memory"]
    return {**row, "measured": measured, "met": _meets(measured, bound.at_most, bound.at_least)}


def _meets(measured: float, at_most: float | None, at_least: float | None) -> bool:
    return (at_most is None or measured <= at_most) and (at_least is None or measured >= at_least)


def effort(one: Record, roof: Record) -> float:
    """Return the median of seconds × the FLOP/s of the machine in the same round: cases run minutes apart."""
    return statistics.median(
        seconds * rates["flops"] for seconds, rates in zip(one["rounds"], roof["rounds"], strict=False)
    )


def grown(growth: Growth, results: list[Record]) -> Record:
    """Return a growth bound with the measured slope of log(measure) against log(axis) over the cases of its group."""
    points = []
    for result in results:
        one = result["contenders"].get(growth.contender, {})
        if result["group"] == growth.group and "seconds" in one:
            value = effort(one, result["roofline"]) if growth.measure == "time" else one["memory"]["peak_bytes"]
            points.append((math.log(result["sizes"][result["axis"]]), math.log(max(1e-9, value))))
    row = {"group": growth.group, "contender": growth.contender, "measure": growth.measure, "at_most": growth.at_most}
    if len(points) < 3:
        return {**row, "measured": None, "met": None, "why": "fewer than three cases of the group were measured"}
    slope = statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope
    return {**row, "measured": slope, "met": slope <= growth.at_most, "why": None}
