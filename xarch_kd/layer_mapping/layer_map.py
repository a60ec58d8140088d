"""Layer map: the weight of each teacher layer in the loss of each student layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from rich.text import Text
from torch import Tensor

from xarch_kd.display import preformatted, shortened_lines
from xarch_kd.errors import UsageError

Pairs = tuple[tuple[int, int, float], ...]

# Rows are divided by their sum in float64: far above its rounding error, far below any weight that matters.
ROW_TOLERANCE: Final = 1e-9
# Fraction of the usable teacher layers beyond the first one.
COLLAPSED_SHARE: Final = 0.25
PLOT_WIDTH: Final = 80
SHADES: Final = "░▒▓█"
ROW_LABEL: Final = "  {:5.2f} at {}"


@dataclass(frozen=True, eq=False, repr=False)
class LayerMap:
    """Weights [student layers, teacher layers], float64 on the CPU: non-negative, rows that sum to 1 or are 0.

    The loss of student layer i is Σ_j weights[i, j] · loss(student i, teacher j); a row of zeros is a layer that is
    not matched. For squared errors its gradient equals that of a loss against the weighted mean of the teacher layers.

    Raises UsageError for negative weights, or rows with another sum.

    >>> import torch
    >>> from xarch_kd.layer_mapping import LayerMap
    >>> LayerMap("mine", torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])).pairs()
    ((0, 0, 1.0), (1, 1, 0.5), (1, 2, 0.5))
    """

    strategy: str
    weights: Tensor

    def __post_init__(self) -> None:
        weights = self.weights.detach().to("cpu", torch.float64, copy=True)
        if weights.dim() != 2 or 0 in weights.shape:
            raise UsageError(
                f"layers: {self.strategy} needs at least one layer on both sides",
                found=list(weights.shape),
                allowed="[student layers, teacher layers]",
            )
        totals = weights.sum(1)
        sound = ((totals - 1).abs() <= ROW_TOLERANCE) | (totals == 0)
        # A NaN fails the second comparison, an infinity the first.
        if not bool(sound.all()) or not bool((weights >= 0).all()):
            raise UsageError(
                f"layers: the weights of {self.strategy} are no layer map",
                found=f"rows that sum to {', '.join(f'{total:.6g}' for total in totals.tolist())}",
                allowed="non-negative weights, rows that sum to 1 or are 0",
            )
        object.__setattr__(self, "weights", weights)

    def __repr__(self) -> str:
        return shortened_lines(self.text_plot(), more="print(layer_map.text_plot())")

    def __rich__(self) -> Text:
        return Text(self.text_plot())

    def _repr_html_(self) -> str:
        return preformatted(self.text_plot())

    @classmethod
    def from_targets(cls, strategy: str, targets: Sequence[int | None], teacher_layers: int) -> LayerMap:
        """Return the map from student layer i to teacher layer `targets[i]`; None leaves the layer unmatched."""
        weights = torch.zeros(len(targets), teacher_layers, dtype=torch.float64)
        for student, teacher in enumerate(targets):
            if teacher is not None:
                weights[student, teacher] = 1.0
        return cls(strategy, weights)

    def pairs(self) -> Pairs:
        """Return (student, teacher, weight) of every weight that is not 0, by student layer, then by teacher layer."""
        return tuple(
            (student, teacher, weight)
            for student, row in enumerate(self.weights.tolist())
            for teacher, weight in enumerate(row)
            if weight
        )

    def collapsed(self) -> str | None:
        """Return a warning if the student layers share very few teacher layers, else None.

        The effective number of teacher layers is exp(entropy) of the mean row: n for n rows on n different layers, 1
        for n rows on one layer. A map has collapsed below 1 + (most - 1) / 4, `most` being the largest possible number.
        """
        rows = self.weights[self.weights.sum(1) > 0]
        most = min(rows.shape)
        if most < 2:
            return None
        used = usage_entropy(rows).exp().item()
        if used >= 1 + (most - 1) * COLLAPSED_SHARE:
            return None
        usage = rows.mean(0)
        most_used = int(usage.argmax())
        return (
            f"the layer map collapsed: {rows.shape[0]} student layers learn from {used:.1f} teacher layers "
            f"(up to {most} are possible), {usage[most_used].item():.0%} from layer {most_used}"
        )

    def text_plot(self) -> str:
        """Return the map as text of at most 80 columns: one line per student layer, one column per teacher layer.

        `·` is weight 0, `░ ▒ ▓ █` are weights up to 1/4, 1/2, 3/4 and 1. If the teacher has more layers than fit,
        neighboring layers share a column, which shows the sum of their weights.
        """
        columns = _columns(self.weights, PLOT_WIDTH)
        sums = torch.stack([part.sum(1) for part in columns], dim=1)
        return _drawn(self.strategy, self.weights, sums, PLOT_WIDTH, [""] * len(sums))


def similarity_text_plot(name: str, similarity: Tensor) -> str:
    """Return a similarity [student layers, teacher layers] as text of at most 80 columns.

    Shades go from `·`, the smallest value, to `█`, the largest, in equal steps; layers that share a column show their
    maximum. Each row ends with its maximum and the teacher layer that has it.

    >>> import torch
    >>> from xarch_kd.layer_mapping import similarity_text_plot
    >>> print(similarity_text_plot("cka", torch.eye(2)))
    cka, 0.00 · to 1.00 █: student layers down, teacher layers across
       0
     0 █·   1.00 at 0
     1 ·█   1.00 at 1
    """
    matrix = similarity.detach().to("cpu", torch.float64)
    least, most = float(matrix.min()), float(matrix.max())
    best = matrix.max(1)
    width = PLOT_WIDTH - len(ROW_LABEL.format(0.0, matrix.shape[1] - 1))
    highest = torch.stack([part.amax(1) for part in _columns(matrix, width)], dim=1)
    # If all values are equal, all are drawn as the smallest.
    shares = (highest - least) / (most - least) if most > least else torch.zeros_like(highest)
    row_labels = [
        ROW_LABEL.format(value, layer) for value, layer in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return _drawn(f"{name}, {least:.2f} · to {most:.2f} █", matrix, shares, width, row_labels)


def _columns(matrix: Tensor, width: int) -> tuple[Tensor, ...]:
    """Return the columns of a plot, each one or more neighboring columns of the matrix."""
    return matrix.split(-(-matrix.shape[1] // (width - _margin(matrix))), dim=1)


def _margin(matrix: Tensor) -> int:
    return max(len(str(matrix.shape[0] - 1)), 2) + 1


def _drawn(name: str, matrix: Tensor, shares: Tensor, width: int, row_labels: Sequence[str]) -> str:
    """Return the plot of `shares` [student layers, columns], each 0 to 1, with `row_labels` after the rows."""
    margin, group = _margin(matrix), -(-matrix.shape[1] // (width - _margin(matrix)))
    title = f"{name}: student layers down, teacher layers across" + (f", {group} to a column" if group > 1 else "")
    lines = [title, " " * margin + _ruler(range(0, matrix.shape[1], group), width - margin)]
    for student, (row, more) in enumerate(zip(shares.tolist(), row_labels, strict=True)):
        lines.append(f"{student:>{margin - 1}} " + "".join(map(_shade, row)) + more)
    return "\n".join(line.rstrip() for line in lines)


def usage_entropy(weights: Tensor) -> Tensor:
    """Return the entropy (nats) of the mean of rows that sum to 1: a scalar with a gradient."""
    usage = weights.mean(0)
    # The derivative of log at 0 is infinite, and rows that are nearly one-hot underflow to 0.
    return -(usage * usage.clamp_min(torch.finfo(usage.dtype).tiny).log()).sum()


def check_depths(strategy: str, student_layers: int, teacher_layers: int) -> None:
    """Raise UsageError unless both models have a layer."""
    if student_layers < 1 or teacher_layers < 1:
        raise UsageError(
            f"layers: {strategy} needs at least one layer on both sides",
            found=f"{student_layers} student layers, {teacher_layers} teacher layers",
        )


def _shade(weight: float) -> str:
    # Rounded, so that three weights of 1/3 do not sum to more than 1.
    return SHADES[min(int(-(-round(weight * 4, 6) // 1)), 4) - 1] if weight > 5e-7 else "·"


def _ruler(starts: range, width: int) -> str:
    """Return the ruler line: the first layer of every fifth column, where its number fits."""
    line = ""
    for column in range(0, len(starts), 5):
        label = str(starts[column])
        if column >= len(line) and column + len(label) <= width:
            line = line.ljust(column) + label
    return line
