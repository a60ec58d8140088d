"""Sections of the evaluation suites: likelihood, speed, suites of figures and curves, results of unknown form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from xarch_kd.evaluation.likelihood_suite import LikelihoodResult, likelihood_from_json
from xarch_kd.evaluation.speed_suite import ContextFigures, SpeedResult, gains, size_text, speed_from_json
from xarch_kd.evaluation.suite_result import result_to_json
from xarch_kd.plots.measured import Curve, Difference, intervals, lines
from xarch_kd.plots.style import label
from xarch_kd.report.content import Folded, Item, Lines, Picture, Section, Table, Texts, attempt, interval, number
from xarch_kd.report.read import RunRecord

TITLES: Final = {
    "likelihood": "Likelihood",
    "exposure": "Exposure to its own text",
    "generation": "Generation",
    "diversity": "Diversity",
    "long_range": "Long range",
    "overlap": "Overlap with references",
    "similarity": "Similarity of layers",
    "tasks": "Tasks",
    "speed": "Speed and memory",
}
NEUTRAL: Final = {"difference": 0.0, "excess": 0.0, "ratio": 1.0}
# An axis that spans more than this factor is logarithmic.
LOG_RATIO: Final = 8.0
LONGEST_DATA: Final = 20_000


def suite_sections(run: RunRecord) -> Iterator[Section]:
    """Yield a section for each suite that was measured."""
    for name, data in run.results.items():
        build = {"likelihood": likelihood_section, "speed": speed_section}.get(name, figures_section)
        yield attempt(partial(build, name, data), partial(unknown_section, name, data))


def likelihood_section(name: str, data: Any) -> Section:
    """Return the section of the suite `likelihood`."""
    results = likelihood_from_json(data)
    section = Section(
        name=name,
        title=TITLES[name],
        note="Both models predict the same tokens. Lower is better; differences are student minus teacher, in nats per "
        "token, with a paired bootstrap interval.",
    )
    bounds = [Difference(name=one.text, value=one.difference, low=one.low, high=one.high) for one in results]
    section.items.append(
        Picture(
            figure=intervals(bounds, title="Student minus teacher", x_label="nats per token"),
            caption="Difference on each text; right of the line the student is worse.",
            alternative="Differences: "
            + "; ".join(
                f"{one.name} {number(one.value, sign=True)} ({interval(one.low, one.high, sign=True)})"
                for one in bounds
            ),
        )
    )
    with_positions = [result for result in results if len(result.by_position) > 1]
    if with_positions:
        section.items.append(_position_differences(with_positions))
    section.items += [_positions(result) for result in with_positions]
    section.items.append(
        Table(
            caption="Likelihood on the same tokens, nats per token",
            headings=("text", ">tokens", ">teacher", ">student", ">difference", ">interval", ">p", ">perplexity"),
            rows=[
                (
                    label(f"{one.text}: {one.description}" if one.description else one.text, 110),
                    f"{one.tokens:,}",
                    f"{one.teacher_nll:.4f}",
                    f"{one.student_nll:.4f}",
                    f"{one.difference:+.4f}",
                    "-" if one.low is None or one.high is None else f"{one.low:+.4f} to {one.high:+.4f}",
                    "-" if one.p_value is None else f"{one.p_value:.2g}",
                    f"{one.teacher_perplexity:.2f} → {one.student_perplexity:.2f}",
                )
                for one in results
            ],
        )
    )
    for one in results:
        if one.details is not None:
            section.items += figures_section(name, result_to_json(one.details)).items
    return section


def _places(result: LikelihoodResult) -> list[float]:
    """Return the geometric middle of each range of positions."""
    return [math.sqrt(max(part.start, 1) * max(part.stop - 1, 1)) for part in result.by_position]


def _position_differences(results: Sequence[LikelihoodResult]) -> Picture:
    colors = ("student", "green", "purple", "pink", "teal", "gold")
    found = [
        Curve(
            name=one.text,
            x=_places(one),
            y=[part.student_nll - part.teacher_nll for part in one.by_position],
            color=colors[index % len(colors)],
        )
        for index, one in enumerate(results)
    ]
    ends = ", ".join(f"{one.name} {one.y[-1]:+.3f}" for one in found)
    return Picture(
        figure=lines(found, title="Difference by position", x_label="tokens of context", log_x=True, zero=True),
        caption="Student minus teacher by the number of tokens before the predicted one, nats per token.",
        alternative=f"Difference of NLL by position; at the longest context: {ends} nats per token",
    )


def _positions(result: LikelihoodResult) -> Picture:
    parts = result.by_position
    at = _places(result)
    found = [
        Curve(name="teacher", x=at, y=[part.teacher_nll for part in parts], color="teacher"),
        Curve(name="student", x=at, y=[part.student_nll for part in parts], color="student"),
    ]
    first, last = parts[0], parts[-1]
    return Picture(
        figure=lines(found, title=f"NLL by position, {result.text}", x_label="tokens of context", log_x=True),
        caption=f"Mean NLL by the number of tokens before the predicted one, {result.text}.",
        alternative=f"NLL of both models on {result.text} from {first.start} to {last.stop - 1} tokens of context; at "
        f"the longest, teacher {last.teacher_nll:.3f} and student {last.student_nll:.3f} nats per token",
    )


def speed_section(name: str, data: Any) -> Section:
    """Return the section of the suite `speed`."""
    result = speed_from_json(data)
    section = Section(name=name, title=TITLES[name], note=f"One sequence, {result.dtype}, plain transformers.")
    section.items += _speed_pictures(result)
    rows = []
    for context in result.contexts:
        own, other = context.student, context.teacher
        rows.append(
            (
                f"{context.tokens:,}",
                _pair(other.cache_bytes or other.measured_bytes, own.cache_bytes or own.measured_bytes, size_text),
                _pair(other.batch, own.batch, lambda count: f"{count:,}"),
                _pair(other.prefill and other.prefill.median, own.prefill and own.prefill.median, _seconds),
                _pair(other.decode and other.decode.median, own.decode and own.decode.median, _seconds),
                _pair(other.peak_bytes, own.peak_bytes, size_text),
            )
        )
    headings = (">context", ">cache", f">sequences in {size_text(result.memory)}", ">prefill", ">per token", ">peak")
    kept = [index for index in range(len(headings)) if index == 0 or any(row[index] != "-" for row in rows)]
    section.items.append(
        Table(
            caption="Teacher → student, by tokens of context",
            headings=[headings[index] for index in kept],
            rows=[[row[index] for index in kept] for row in rows],
        )
    )
    section.items.append(Lines(lines=list(gains(result)), as_list=True))
    return section


def _speed_pictures(result: SpeedResult) -> Iterator[Picture]:
    def cache(context: ContextFigures, side: str) -> float | None:
        size = getattr(context, side).cache_bytes or getattr(context, side).measured_bytes
        return None if size is None else size / 2**20

    def decode(context: ContextFigures, side: str) -> float | None:
        timing = getattr(context, side).decode
        return None if timing is None else 1000 * timing.median

    def prefill(context: ContextFigures, side: str) -> float | None:
        timing = getattr(context, side).prefill
        return None if timing is None else timing.median

    for title, unit, value in (
        ("Cache and state", "MiB", cache),
        ("Time per decoded token", "ms", decode),
        ("Prefill", "s", prefill),
    ):
        sides = {}
        for side in ("teacher", "student"):
            points = [(context.tokens, value(context, side)) for context in result.contexts]
            sides[side] = [(tokens, found) for tokens, found in points if found is not None]
        if all(len(points) > 1 for points in sides.values()):
            drawn = [
                Curve(name=side, x=[x for x, _ in points], y=[y for _, y in points], color=side)
                for side, points in sides.items()
            ]
            ends = ", ".join(f"{side} {points[-1][1]:.4g} {unit}" for side, points in sides.items())
            yield Picture(
                figure=lines(
                    drawn, title=f"{title} ({unit})", x_label="tokens of context", log_x=True, log_y=value is cache
                ),
                caption=f"{title}, {unit}.",
                alternative=f"{title} by context length; at {sides['teacher'][-1][0]:,} tokens {ends}",
            )


def _pair(teacher: Any, student: Any, shown: Any) -> str:
    if teacher is None and student is None:
        return "-"
    return " → ".join("?" if value is None else shown(value) for value in (teacher, student))


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 0.9995 else f"{value:.1f} s"


def figures_section(name: str, data: Any) -> Section:
    """Return the section of a suite whose result has figures, curves and samples.

    Raises KeyError, TypeError or ValueError for data of another form.
    """
    section = Section(name=name, title=TITLES.get(name, name.replace("_", " ").capitalize()))
    figures = [dict(figure) for figure in data["figures"]]
    section.items += _interval_pictures(figures)
    section.items += [_curve_picture(curve) for curve in data["curves"]]
    if figures:
        section.items.append(_figure_table(figures))
    if data["samples"]:
        pairs = [(str(one["prompt"]), str(one["teacher"]), str(one["student"])) for one in data["samples"]]
        section.items.append(Texts(caption="The same prompt, two models", pairs=pairs))
    notices = [str(notice) for notice in data.get("notices") or ()]
    section.items.append(Lines(lines=[*notices, f"signature: {data['signature']}"], as_list=True))
    return section


def _interval_pictures(figures: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    """Yield a picture of all differences, ratios or excesses with intervals, by unit."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for figure in figures:
        kind = str(figure["compared"])
        if kind in NEUTRAL and None not in (figure["value"], figure["low"], figure["high"]):
            groups.setdefault((kind, "" if kind == "ratio" else str(figure["unit"])), []).append(figure)
    for (kind, unit), members in groups.items():
        if len(members) < 2:
            continue
        axis = unit or ("ratio" if kind == "ratio" else "")
        what = {"ratio": "Student / teacher", "difference": "Student minus teacher", "excess": "Excess"}[kind]
        bounds = [
            Difference(name=str(one["name"]), value=one["value"], low=one["low"], high=one["high"]) for one in members
        ]
        yield Picture(
            figure=intervals(bounds, title=what, x_label=axis, neutral=NEUTRAL[kind]),
            caption=f"{what}{f', {unit}' if unit else ''}, with intervals; the line is no difference.",
            alternative=f"{what}: "
            + "; ".join(f"{one.name} {number(one.value)} ({interval(one.low, one.high)})" for one in bounds),
        )


def _curve_picture(curve: Mapping[str, Any]) -> Picture:
    at = [float(value) for value in curve["at"]]
    drawn = []
    for index, (name, values) in enumerate(curve["lines"].items()):
        band = (curve.get("bands") or {}).get(name)
        drawn.append(
            Curve(
                name=str(name),
                x=at,
                y=_floats(values),
                low=_floats(low for low, _ in band) if band else None,
                high=_floats(high for _, high in band) if band else None,
                color=str(name) if name in ("teacher", "student") else ("green", "purple", "pink", "teal")[index % 4],
            )
        )
    positive = [value for value in at if value > 0]
    log_x = len(positive) == len(at) and len(at) > 2 and max(at) / min(at) > LOG_RATIO
    title, unit = str(curve["name"]), str(curve["unit"] or "")
    ends = ", ".join(f"{one.name} {number(one.y[-1])}" for one in drawn if one.y)
    banded = "; bands are intervals" if any(one.low is not None for one in drawn) else ""
    return Picture(
        figure=lines(drawn, title=title, y_label=unit, x_label=str(curve["x"]), log_x=log_x, zero=unit == "%"),
        caption=f"{title[:1].upper()}{title[1:]} by {curve['x']}{banded}.",
        alternative=f"{title} by {curve['x']}, {len(at)} points; at the last: {ends or 'nothing'}",
    )


def _floats(values: Any) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _figure_table(figures: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for one in figures:
        kind = str(one["compared"])
        value = number(one["value"], sign=kind in ("difference", "excess"))
        rows.append(
            (
                f"{one['name']} ({one['unit']})" if one["unit"] else str(one["name"]),
                number(one["teacher"]),
                number(one["student"]),
                "-" if one["value"] is None else f"{value} ({kind})",
                interval(one["low"], one["high"]),
                number(one["p_value"]),
                number(one["ceiling"]),
                f"{one['count']:,} {one['of']}",
            )
        )
    headings = ("figure", ">teacher", ">student", ">compared", ">interval", ">p", ">teacher against itself", ">of")
    kept = [index for index in range(len(headings)) if index == 0 or any(row[index] != "-" for row in rows)]
    return Table(
        caption="Figures",
        headings=[headings[index] for index in kept],
        rows=[[row[index] for index in kept] for row in rows],
    )


def unknown_section(name: str, data: Any) -> Section:
    """Return a section that shows results of a form that is not known here as they are."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    if len(text) > LONGEST_DATA:
        text = f"{text[:LONGEST_DATA]}\n…"
    items: list[Item] = [Folded(caption="Results as they were stored", text=text)]
    return Section(
        name=name,
        title=TITLES.get(name, name.replace("_", " ").capitalize()),
        note="This version has no figures for these results.",
        items=items,
    )
