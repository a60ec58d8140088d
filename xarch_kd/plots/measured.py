"""Figures of measurements: curves with bands, differences with intervals, pairs of bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xarch_kd.plots.style import COLORS, WIDTH, house_style, label, new_figure, plain_log_ticks, series_color

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve: values `y` at `x`, NaN where there is none, and the bounds of their intervals.

    `color` is a role of the house style, by default the next one.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    color: str | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference with its interval, None where it cannot be estimated."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def lines(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
) -> Figure:
    """Return a figure of curves, with bands between `low` and `high`; `zero` draws a line at 0."""
    with house_style():
        figure, (axes,) = new_figure(width=WIDTH, height=2.4)
        if zero:
            axes.axhline(0, color=COLORS["muted"], linewidth=0.8)
        for index, curve in enumerate(curves):
            color = COLORS[curve.color] if curve.color in COLORS else series_color(index)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(
                    list(curve.x), list(curve.low), list(curve.high), color=color, alpha=0.18, linewidth=0
                )
            axes.plot(list(curve.x), list(curve.y), "o-", markersize=2.8, color=color, label=label(curve.name, 24))
        _scale(axes.xaxis, axes.set_xscale, [value for curve in curves for value in curve.x], log_x)
        _scale(axes.yaxis, axes.set_yscale, [value for curve in curves for value in curve.y], log_y)
        axes.set_title(label(title))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(curves) > 1:
            axes.legend()
    return figure


def intervals(differences: Sequence[Difference], *, title: str, x_label: str, neutral: float = 0.0) -> Figure:
    """Return a figure of differences, one per line, with their intervals and a line at `neutral`."""
    with house_style():
        figure, (axes,) = new_figure(width=WIDTH, height=0.8 + 0.3 * max(len(differences), 1))
        axes.axvline(neutral, color=COLORS["muted"], linewidth=0.8)
        for row, one in enumerate(differences):
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [row, row], color=COLORS["student"], linewidth=2.4, alpha=0.45)
            axes.plot([one.value], [row], "o", markersize=4.5, color=COLORS["student"])
        axes.set_yticks(range(len(differences)), [label(one.name, 26) for one in differences])
        axes.set_ylim(len(differences) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_title(label(title))
        axes.set_xlabel(x_label)
    return figure


def bars(
    names: Sequence[str],
    values: Sequence[tuple[str, Sequence[float | None]]],
    *,
    title: str,
    y_label: str = "",
    stacked: bool = False,
) -> Figure:
    """Return a figure of bars: a group per name, a bar per series in it, side by side or in one place if `stacked`."""
    with house_style():
        figure, (axes,) = new_figure(width=WIDTH, height=2.4)
        width = 0.8 if stacked else 0.8 / max(len(values), 1)
        for index, (series, heights) in enumerate(values):
            color = COLORS.get(series, series_color(index))
            offset = 0.0 if stacked else width * (index + 0.5) - 0.4
            places = [place + offset for place in range(len(names))]
            known = [(x, y) for x, y in zip(places, heights, strict=True) if y is not None]
            axes.bar([x for x, _ in known], [y for _, y in known], width * 0.92, color=color, label=label(series, 24))
        numbered = all(name.isdigit() for name in names)
        turned = not numbered and sum(len(name) for name in names) > 36
        every = -(-len(names) // 12) if numbered else 1
        axes.set_xticks(range(0, len(names), every), [label(name, 18) for name in names[::every]])
        if turned:
            axes.tick_params(axis="x", rotation=35)
            for tick in axes.get_xticklabels():
                tick.set_horizontalalignment("right")
        axes.grid(axis="x", visible=False)
        axes.set_title(label(title))
        axes.set_ylabel(y_label)
        if len(values) > 1:
            axes.legend()
    return figure


def _scale(axis: Any, set_scale: Any, values: Sequence[float], log: bool) -> None:
    """Make an axis logarithmic if that was asked for and all values allow it."""
    finite = [value for value in values if math.isfinite(value)]
    if log and finite and min(finite) > 0:
        set_scale("log")
        plain_log_ticks(axis)
