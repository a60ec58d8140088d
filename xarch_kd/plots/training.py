"""Figure of the loss curves of a run: total, parts and held-out text of each stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from xarch_kd.errors import UsageError
from xarch_kd.plots.style import COLORS, WIDTH, house_style, label, new_figure, plain_log_ticks, series_color
from xarch_kd.run.curves import CurveReader, StageCurves
from xarch_kd.run.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points of a drawn curve; of a longer one, neighboring steps are averaged.
POINTS: Final = 240
# A loss that falls by more than this factor is drawn on a logarithmic scale.
LOG_RATIO: Final = 8.0
PARTS: Final = 6


class HasPath(Protocol):
    """A run, or anything else with the path of a run folder."""

    @property
    def path(self) -> Path:
        """The run folder."""
        ...


def curves(run: HasPath | str | Path) -> Figure:
    """Return a figure with a panel per stage of a run, training or finished: loss by step, its parts, held-out loss.

    Raises UsageError for a folder without a run, or one whose run took no step yet.

    >>> import xarch_kd as xkd
    >>> from rich.console import Console
    >>> from xarch_kd.testing.examples import write_example_files
    >>> write_example_files()  # teacher/, text.txt and mapping.yaml, all tiny
    >>> run = xkd.train("mapping.yaml", "runs/first", console=Console(quiet=True))
    >>> [axes.get_title("left") for axes in xkd.plots.curves(run).axes]
    ['mixers']
    """
    folder = RunFolder(Path(run) if isinstance(run, str | Path) else run.path)
    reader = CurveReader(folder.events)
    reader.update()
    if not reader.stages:
        raise UsageError(
            "There are no steps to draw.",
            asked=folder.root,
            found="no run folder" if not folder.root.is_dir() else "a run without a step",
            fix="give the folder that `xarch-kd train --output` wrote, once it trains",
        )
    return stage_panels(list(reader.stages.values()))


def stage_panels(stages: Sequence[StageCurves]) -> Figure:
    """Return a figure of one panel per stage, side by side."""
    with house_style():
        figure, axes = new_figure(1, len(stages), width=WIDTH * len(stages), height=2.5)
        for place, stage in zip(axes, stages, strict=True):
            _panel(place, stage)
    return figure


def losses(stage: str, curves: Mapping[str, Mapping[int, float]]) -> Figure:
    """Return a figure of the losses of one stage by step, a line per run."""
    with house_style():
        figure, (axes,) = new_figure()
        for index, (name, curve) in enumerate(curves.items()):
            axes.plot(*thinned(curve), color=series_color(index), label=label(name, 24))
        axes.set_title(label(stage))
        axes.set_xlabel("step")
        axes.legend()
    return figure


def _panel(axes: Axes, stage: StageCurves) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn = {"loss": stage.loss} | (
        {name: curve for name, curve in list(stage.parts.items())[:PARTS]} if len(stage.parts) > 1 else {}
    )
    for index, (name, curve) in enumerate(drawn.items()):
        steps, values = thinned(curve)
        color = COLORS["ink"] if index == 0 else series_color(index - 1)
        axes.plot(steps, values, color=color, linewidth=1.6 if index == 0 else 1.1, label=label(name, 24))
    if stage.held_out:
        steps = sorted(stage.held_out)
        axes.plot(
            steps,
            [stage.held_out[step] for step in steps],
            "o",
            markersize=3,
            color=COLORS["green"],
            label="held-out loss",
        )
    seen = [value for curve in (*drawn.values(), stage.held_out) for value in curve.values()]
    if seen and min(seen) > 0 and max(seen) / min(seen) > LOG_RATIO:
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(label(stage.name))
    axes.set_xlabel("step")
    if len(drawn) > 1 or stage.held_out:
        axes.legend()


def thinned(curve: Mapping[int, float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """Return steps and values of a curve, means over equal numbers of neighboring steps where it has too many."""
    steps = sorted(curve)
    size = max(1, math.ceil(len(steps) / points))
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    return (
        [sum(part) / len(part) for part in parts],
        [sum(curve[step] for step in part) / len(part) for part in parts],
    )
