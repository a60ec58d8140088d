"""Figure of a layer map: the blocks of both models, and which student layer learns from which teacher layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from xarch_kd.plots.style import COLORS, WIDTH, house_style, label, new_figure, series_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from xarch_kd.planning.plan import Plan

MIXER_COLORS: Final = ("muted", "student", "green", "purple", "teal", "pink", "gold")
ROW_HEIGHT: Final = 0.14
# Above this many blocks the rows are narrower than a number, and every fifth block has one.
NUMBERED: Final = 48
TALLEST: Final = 7.5


def layer_map(plan: Plan | Mapping[str, Any]) -> Figure:
    """Return a figure of both models' blocks, colored by mixer, with a line from each student layer to its teachers.

    `plan` is a plan, or the data of a run's `plan.json`. Lines of one `align` entry share a color; a line of a small
    weight is paler. Replaced blocks have a bold edge.

    >>> import xarch_kd as xkd
    >>> from xarch_kd.testing.examples import write_example_files
    >>> write_example_files()  # teacher/, text.txt and mapping.yaml, all tiny
    >>> figure = xkd.plots.layer_map(xkd.plan("mapping.yaml"))
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['teacher', '0', '1', '2', 'student', '0', '1', '2']
    """
    data = _data(plan)
    teacher, student = data["teacher"]["layers"], data["student"]["layers"]
    depth = max(len(teacher), len(student), 1)
    with house_style():
        figure, (axes,) = new_figure(width=WIDTH, height=min(TALLEST, ROW_HEIGHT * depth + 0.8))
        axes.set_axis_off()
        # 0 is on top. Models of different depth are drawn with the same height.
        scales = {"teacher": depth / max(len(teacher), 1), "student": depth / max(len(student), 1)}
        mixers = list(dict.fromkeys(str(row["mixer"]) for row in (*teacher, *student)))
        colors = {mixer: COLORS[MIXER_COLORS[index % len(MIXER_COLORS)]] for index, mixer in enumerate(mixers)}
        for name, rows, left in (("teacher", teacher, 0.0), ("student", student, 2.0)):
            axes.text(left + 0.4, -0.6, name, ha="center", va="bottom", weight="bold")
            _column(axes, rows, left, scales[name], colors)
        entries = links(data)
        for index, (entry, pairs) in enumerate(entries.items()):
            color = series_color(index + 2) if len(entries) > 1 else COLORS["ink"]
            for position, (own, other, weight) in enumerate(pairs):
                axes.plot(
                    [0.82, 1.98],
                    [(other + 0.5) * scales["teacher"], (own + 0.5) * scales["student"]],
                    color=color,
                    linewidth=1.0,
                    alpha=0.15 + 0.75 * weight,
                    solid_capstyle="round",
                    label=label(entry, 24) if position == 0 else None,
                )
        axes.set_xlim(-0.05, 2.85)
        axes.set_ylim(depth + 0.1, -1.9)
        _legend(figure, axes, colors, named=len(entries) > 1)
    return figure


def links(data: Mapping[str, Any]) -> dict[str, list[tuple[int, int, float]]]:
    """Return (student layer, teacher layer, share of the row's weight) of each `align` entry of a plan's data."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for stage in data["stages"]:
        for pair in stage["pairs"]:
            if pair["student_layer"] is not None and pair["teacher_layer"] is not None:
                own = found.setdefault(str(pair["align"]), {})
                own[pair["student_layer"], pair["teacher_layer"]] = abs(float(pair["weight"]))
    shares = {}
    for entry, weights in found.items():
        totals: dict[int, float] = {}
        for (student, _), weight in weights.items():
            totals[student] = totals.get(student, 0.0) + weight
        shares[entry] = [
            (student, teacher, weight / totals[student] if totals[student] > 0 else 1.0)
            for (student, teacher), weight in sorted(weights.items())
        ]
    return shares


def _data(plan: Plan | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(plan, Mapping):
        return plan
    from xarch_kd.planning.render import plan_as_dict

    return plan_as_dict(plan)


def _column(
    axes: Axes, rows: Sequence[Mapping[str, Any]], left: float, scale: float, colors: Mapping[str, str]
) -> None:
    from matplotlib.patches import Rectangle

    every = 1 if len(rows) <= NUMBERED else 5
    for position, row in enumerate(rows):
        color = colors[str(row["mixer"])]
        axes.add_patch(
            Rectangle(
                (left, (position + 0.08) * scale),
                0.8,
                0.84 * scale,
                facecolor=color,
                alpha=0.85 if row["replaced"] else 0.35,
                edgecolor=COLORS["ink"] if row["replaced"] else "none",
                linewidth=0.8,
            )
        )
        if position % every == 0:
            axes.text(
                left - 0.04 if left == 0 else left + 0.84,
                (position + 0.5) * scale,
                str(row["index"]),
                ha="right" if left == 0 else "left",
                va="center",
                fontsize=6.5,
                color=COLORS["muted"],
            )


def _legend(figure: Figure, axes: Axes, colors: Mapping[str, str], *, named: bool) -> None:
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(facecolor=color, alpha=0.7, label=label(mixer, 20)) for mixer, color in colors.items()]
    if named:
        handles += axes.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if len(handles) > 1 else 1)
