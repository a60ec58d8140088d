"""Figures of matrices: token-mixing matrices of teacher and student, and similarities of their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from xarch_kd.errors import UsageError
from xarch_kd.plots.style import COLORS, WIDTH, house_style, label, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from xarch_kd.taps.trace import Trace

    Matrices: TypeAlias = Trace | Mapping[int, Tensor]

COLOR_MAP: Final = "viridis"
# Layers and heads of a figure where none are named, and tokens of a drawn matrix.
LAYERS: Final = 3
HEADS: Final = 2
TOKENS: Final = 96
# Most weights are small: shades are those of their square root.
GAMMA: Final = 0.5


def mixing(
    student: Matrices,
    teacher: Matrices | None = None,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    sequence: int = 0,
    names: tuple[str, str] = ("student", "teacher"),
) -> Figure:
    """Return a figure of token-mixing matrices, those of the teacher at the left of those of the student.

    Both are traces with the tap `mixing`, or matrices [batch, heads, time, time] by layer. Each row of a matrix is
    drawn as the shares of its absolute weights, so that attention and mixers with signed weights are comparable.
    `layers` (default: up to three that both have, evenly spaced) are rows of panels, one for each of `heads` (default:
    up to two, evenly spaced; of a model with fewer heads, the head at the same fraction). At most 96 tokens are drawn.

    Raises UsageError without such a tap, for layers that were not traced, and for heads that are out of range.

    >>> import torch
    >>> import xarch_kd as xkd
    >>> figure = xkd.plots.mixing({3: torch.eye(4).expand(1, 2, 4, 4)})
    >>> [axes.get_title("left") for axes in figure.axes]
    ['student 3.0', 'student 3.1']
    """
    sides = [(names[0], _by_layer(student))]
    if teacher is not None:
        sides.insert(0, (names[1], _by_layer(teacher)))
    common = sorted(set.intersection(*(set(matrices) for _, matrices in sides)))
    chosen = spread(common, LAYERS) if layers is None else list(layers)
    missing = [layer for layer in chosen if layer not in common]
    if missing or not chosen:
        raise UsageError("No mixing of this layer was traced.", asked=missing or "mixing", found=common or "none")
    panels = []
    for layer in chosen:
        dense = [(name, _dense(matrices[layer], sequence)) for name, matrices in sides]
        most = max(len(matrix) for _, matrix in dense)
        picked = spread(list(range(most)), HEADS) if heads is None else list(heads)
        outside = [head for head in picked if not 0 <= head < most]
        if outside:
            raise UsageError("A layer has no such head.", asked=outside[0], allowed=f"0 to {most - 1}")
        for head in picked:
            for name, matrix in dense:
                own = head * len(matrix) // most
                panels.append((f"{name} {layer}.{own}", matrix[own]))
    return mixing_panels(panels, columns=2 if len(panels) > 1 else 1)


def mixing_panels(panels: Sequence[tuple[str, NDArray[np.float64]]], *, columns: int) -> Figure:
    """Return a figure of matrices [time, time], each with its title, row by row."""
    from matplotlib.colors import PowerNorm

    rows = -(-len(panels) // columns)
    with house_style():
        figure, axes = new_figure(rows, columns, width=WIDTH, height=0.35 + (WIDTH / columns + 0.1) * rows)
        for place, (title, matrix) in zip(axes, panels, strict=False):
            # What a causal matrix cannot read is left blank.
            _image(
                place, np.ma.masked_equal(_shares(matrix[:TOKENS, :TOKENS]), 0), norm=PowerNorm(GAMMA, vmin=0, vmax=1)
            )
            place.set_title(label(title, 22), fontsize=8)
            place.tick_params(labelsize=6.5)
        for place in axes[len(panels) :]:
            place.set_axis_off()
        figure.supxlabel("token that is read", fontsize=8, color=COLORS["muted"])
    return figure


def similarity(
    matrix: Tensor | NDArray[np.float64] | Sequence[Sequence[float]],
    *,
    name: str = "similarity",
    rows: str = "student layer",
    columns: str = "teacher layer",
) -> Figure:
    """Return a heat map of a similarity [student layers, teacher layers], with a dot at the highest of each row.

    Raises UsageError for something else than a matrix of finite numbers.

    >>> import torch
    >>> import xarch_kd as xkd
    >>> xkd.plots.similarity(torch.eye(3), name="CKA").axes[0].get_title("left")
    'CKA'
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise UsageError(
            "A similarity is a matrix of finite numbers.", found=f"shape {list(values.shape)}", allowed="two dimensions"
        )
    with house_style():
        height = 0.9 + (WIDTH - 0.9) * min(1.6, values.shape[0] / values.shape[1])
        figure, (axes,) = new_figure(width=WIDTH, height=height)
        low, high = min(0.0, float(values.min())), max(1.0, float(values.max()))
        image = _image(axes, values, vmin=low, vmax=high)
        best = values.argmax(1)
        axes.plot(best, np.arange(len(best)), "o", markersize=2.5, color="#ffffff", markeredgewidth=0.5)
        axes.set_title(label(name))
        axes.set_xlabel(columns)
        axes.set_ylabel(rows)
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]  # stubs have a spine for the outline
    return figure


def _image(axes: Axes, values: NDArray[np.float64], **options: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(values, cmap=COLOR_MAP, interpolation="nearest", aspect="auto", **options)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    return image


def _by_layer(matrices: Matrices) -> Mapping[int, Any]:
    return matrices if isinstance(matrices, Mapping) else matrices["mixing"]


def _dense(matrix: Any, sequence: int) -> NDArray[np.float64]:
    """Return [heads, time, time] of one sequence, of a mixing or a tensor [batch, heads, time, time]."""
    dense = matrix.dense() if hasattr(matrix, "dense") else matrix
    if dense.ndim != 4 or not 0 <= sequence < dense.shape[0]:
        raise UsageError(
            "There is no such sequence of mixing matrices.",
            asked=f"sequence {sequence}",
            found=list(dense.shape),
            allowed="[batch, heads, time, time]",
        )
    return dense[sequence].detach().double().cpu().numpy()


def _shares(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the shares of each row's absolute weights, 0 in rows without any."""
    weights = np.abs(matrix)
    totals = weights.sum(1, keepdims=True)
    return np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)


def spread(items: Sequence[int], count: int) -> list[int]:
    """Return up to `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / max(count - 1, 1))] for index in range(count)]
