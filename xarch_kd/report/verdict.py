"""Verdict of a run in plain words: what was lost, where, how sure that is, and what was gained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from xarch_kd.evaluation.likelihood_suite import LikelihoodResult, likelihood_from_json
from xarch_kd.evaluation.speed_suite import size_text, speed_from_json
from xarch_kd.evaluation.statistics import LEVEL
from xarch_kd.evaluation.suite_result import result_to_json
from xarch_kd.plots.style import label
from xarch_kd.report.content import interval, number
from xarch_kd.report.read import RunRecord
from xarch_kd.report.suites import NEUTRAL, TITLES

# Figures of one suite that the verdict names; its section has all.
PER_SUITE: Final = 3
NOT_KNOWN: Final = (KeyError, TypeError, ValueError, AttributeError, IndexError)


@dataclass(kw_only=True)
class Verdict:
    """Sentences of a verdict: a headline, and lists of what was lost, gained, not decided, and how sure that is."""

    headline: str
    lost: list[str] = field(default_factory=list)
    gained: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    sure: list[str] = field(default_factory=list)


def verdict_of(run: RunRecord) -> Verdict:
    """Return the verdict of a run; of one without evaluation, that nothing is known about its student."""
    verdict = Verdict(headline="")
    results = _likelihood(run)
    for result in results:
        _judge_likelihood(result, verdict)
    comparisons, before = len(results), len(verdict.lost)
    for result in results:
        if result.details is not None:
            comparisons += _judge_figures("likelihood", result_to_json(result.details), verdict)
    for name, data in run.results.items():
        if name not in ("likelihood", "speed"):
            comparisons += _judge_figures(name, data, verdict)
    worse = len(verdict.lost) - before
    for line, is_better in _speed_changes(run):
        (verdict.gained if is_better else verdict.lost).append(line)
    verdict.headline = _headline(run, results, worse)
    if run.results:
        level = float(run.evaluation.get("level") or LEVEL)
        verdict.sure.append(
            f"Intervals are {level:.0%} bootstrap intervals over rows or prompts. They do not contain "
            "the spread between training seeds, of which this run has one; xarch-kd sweep --seeds trains several."
        )
        if comparisons > 1:
            verdict.sure.append(
                f"{comparisons} comparisons were made, each with its own interval: by chance alone about "
                f"{comparisons * (1 - level):.1f} of them would exclude equality."
            )
    return verdict


def _likelihood(run: RunRecord) -> tuple[LikelihoodResult, ...]:
    try:
        return likelihood_from_json(run.results.get("likelihood") or ())
    except NOT_KNOWN:
        return ()


def _judge_likelihood(result: LikelihoodResult, verdict: Verdict) -> None:
    bounds = "no interval"
    if result.low is not None and result.high is not None:
        bounds = f"interval {result.low:+.3f} to {result.high:+.3f}"
    perplexity = f"perplexity {result.teacher_perplexity:.2f} → {result.student_perplexity:.2f}"
    kind = f" ({label(result.description, 70)})" if result.description else ""
    figures = f"{result.difference:+.3f} nats per token ({bounds}), {perplexity}"
    if result.low is None or result.high is None:
        verdict.undecided.append(f"{result.text}{kind}: {figures}; too few rows for an interval.")
    elif result.low > 0:
        share = math.exp(-result.difference)
        verdict.lost.append(
            f"{result.text}{kind}: {figures}. The right token gets {share:.1%} of the probability that the teacher "
            f"gives it (geometric mean){_worst_position(result)}."
        )
    elif result.high < 0:
        verdict.gained.append(
            f"{result.text}{kind}: {figures}; the student predicts this text better than its teacher."
        )
    else:
        verdict.undecided.append(
            f"{result.text}{kind}: {figures}; a loss above {result.high:.3f} nats per token is excluded at this level."
        )


def _worst_position(result: LikelihoodResult) -> str:
    """Return where in a row most is lost, empty for a single position."""
    if len(result.by_position) < 2:
        return ""
    worst = max(result.by_position, key=lambda part: part.student_nll - part.teacher_nll)
    place = f"{worst.start}" if worst.stop == worst.start + 1 else f"{worst.start} to {worst.stop - 1}"
    return f"; the difference is largest after {place} tokens of context ({worst.student_nll - worst.teacher_nll:+.3f})"


def _judge_figures(name: str, data: Any, verdict: Verdict) -> int:
    """Sort the figures of a suite into lost, gained and undecided; return how many could be judged."""
    try:
        judged = [
            (figure, _direction(figure))
            for figure in data["figures"]
            if figure["compared"] in NEUTRAL and None not in (figure["value"], figure["low"], figure["high"])
        ]
        texts = [(_sentence(name, figure), direction) for figure, direction in judged]
    except NOT_KNOWN:
        return 0
    for target, wanted in ((verdict.lost, -1), (verdict.gained, 1), (verdict.undecided, 0)):
        found = [text for text, direction in texts if direction == wanted]
        target += found[:PER_SUITE]
        if len(found) > PER_SUITE:
            target.append(f"{TITLES.get(name, name)}: {len(found) - PER_SUITE} more, in its section.")
    return len(judged)


def _direction(figure: Mapping[str, Any]) -> int:
    """Return 1 if the student is better, -1 if it is worse or unlike the teacher, 0 if the interval allows equality."""
    neutral = NEUTRAL[figure["compared"]]
    if figure["low"] <= neutral <= figure["high"]:
        return 0
    is_higher = figure["low"] > neutral
    if figure["better"] == "teacher":
        return -1
    return 1 if is_higher == (figure["better"] == "higher") else -1


def _sentence(name: str, figure: Mapping[str, Any]) -> str:
    kind = figure["compared"]
    unit = f" {figure['unit']}" if figure["unit"] and kind != "ratio" else ""
    value = number(figure["value"], sign=kind != "ratio")
    compared = {"ratio": f"{value} times the teacher's", "difference": f"{value}{unit} against the teacher"}
    both = (
        f", teacher {number(figure['teacher'])}, student {number(figure['student'])}"
        if None not in (figure["teacher"], figure["student"])
        else ""
    )
    return (
        f"{TITLES.get(name, name)}, {figure['name']}: {compared.get(kind, value + unit)} "
        f"({interval(figure['low'], figure['high'])}){both}."
    )


def _speed_changes(run: RunRecord) -> Iterator[tuple[str, bool]]:
    """Yield what changes in bytes of cache and in decoding time, and whether the student is better."""
    try:
        result = speed_from_json(run.results["speed"])
        longest = result.contexts[-1]
        own, other = longest.student.cache_bytes, longest.teacher.cache_bytes
    except NOT_KNOWN:
        return
    if own and other:
        change = own / other - 1
        since = f", smaller from {result.smaller_from:,} tokens on" if result.smaller_from is not None else ""
        yield (
            f"Cache of one sequence of {longest.tokens:,} tokens: {size_text(other)} → {size_text(own)} "
            f"({change:+.0%}{since}).",
            change < 0,
        )
    timed = result.timed
    if timed:
        own_time, other_time = timed[-1].student.decode, timed[-1].teacher.decode
        if own_time is not None and other_time is not None:
            yield (
                f"One token after {timed[-1].tokens:,}: {1000 * other_time.median:.3g} → "
                f"{1000 * own_time.median:.3g} ms ({own_time.median / other_time.median - 1:+.0%}), the median here.",
                own_time.median < other_time.median,
            )


def _cache_change(run: RunRecord) -> float | None:
    """Return the relative change of the cache's bytes at the longest context, None if they are not known."""
    try:
        longest = speed_from_json(run.results["speed"]).contexts[-1]
        return longest.student.cache_bytes / longest.teacher.cache_bytes - 1  # type: ignore[operator]  # None: caught
    except (*NOT_KNOWN, ZeroDivisionError):
        return None


def _headline(run: RunRecord, results: tuple[LikelihoodResult, ...], worse: int) -> str:
    if not run.is_finished:
        done = [f"{cost.name} {cost.step:,}/{cost.steps:,}" for cost in run.costs if cost.steps]
        return f"This run is not finished ({', '.join(done) or 'no step yet'}): there is no student to judge yet."
    if not run.results:
        return (
            "This student was not evaluated: how much of its teacher it kept is not known. "
            f"Measure it: xarch-kd evaluate {run.folder.root}"
        )
    parts = []
    if results:
        first = results[0]
        if first.low is None or first.high is None:
            parts.append(f"On {first.text} the student differs by {first.difference:+.3f} nats per token (no interval)")
        elif first.low > 0:
            parts.append(f"The student loses {first.difference:.3f} nats per token on {first.text}")
        elif first.high < 0:
            parts.append(f"The student gains {-first.difference:.3f} nats per token on {first.text}")
        else:
            parts.append(f"No loss on {first.text} is established (at most {first.high:.3f} nats per token)")
    change = _cache_change(run)
    if change is not None:
        amount = (
            "as much cache" if round(change, 2) == 0 else f"{abs(change):.0%} {'less' if change < 0 else 'more'} cache"
        )
        parts.append(f"{'it' if parts else 'The student'} needs {amount} at the longest context")
    if worse:
        parts.append(
            f"{worse} {'other ' if parts else ''}{'measure is' if worse == 1 else 'measures are'} below the teacher's"
        )
    return "; ".join(parts) + "." if parts else "The results are below; none of them compares student and teacher."
