"""What every strategy yields: how much each student block learns from each teacher block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from xarch_kd.errors import UsageError

Pairs = tuple[tuple[int, int, float], ...]

# Rows are made by division in float64; this is far above its rounding and far below any weight that matters.
ROW_TOLERANCE: Final = 1e-9
# Of the teacher blocks that could be used, beyond the first one.
COLLAPSED_SHARE: Final = 0.25
PICTURE_WIDTH: Final = 80
SHADES: Final = "░▒▓█"
BESIDE: Final = "  {:5.2f} at {}"


@dataclass(frozen=True, eq=False)
class LayerMap:
    """Weights [student layers, teacher layers], float64 on the CPU: non-negative, rows that sum to 1 or are 0.

    The match of student layer i is Σ_j weights[i, j] · loss(student i, teacher j); a row of zeros is a layer without
    a match. For squared errors this has the gradient of a match with the weighted mean of the teacher layers.

    Raises UsageError for weights that are not such a map.
    """

    strategy: str
    weights: Tensor

    def __post_init__(self) -> None:
        weights = self.weights.detach().to("cpu", torch.float64, copy=True)
        if weights.dim() != 2 or 0 in weights.shape:
            raise UsageError(
                f"layers: {self.strategy} needs at least one block on both sides",
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

    @classmethod
    def from_targets(cls, strategy: str, targets: Sequence[int | None], teacher_layers: int) -> LayerMap:
        """Return the map of student layer i to teacher layer `targets[i]`, None for no match."""
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
        """Return a warning when the student layers share very few teacher layers, else None.

        The teacher layers in use are counted as exp(entropy) of the mean row: n rows on n layers of their own count n,
        n rows on one layer count 1. Of `most`, what there could be, fewer than 1 + (most - 1) / 4 is a collapse.
        """
        rows = self.weights[self.weights.sum(1) > 0]
        most = min(rows.shape)
        if most < 2:
            return None
        used = usage_entropy(rows).exp().item()
        if used >= 1 + (most - 1) * COLLAPSED_SHARE:
            return None
        usage = rows.mean(0)
        favourite = int(usage.argmax())
        return (
            f"the layer map collapsed: {rows.shape[0]} student layers learn from {used:.1f} teacher layers "
            f"(up to {most} are possible), {usage[favourite].item():.0%} from layer {favourite}"
        )

    def picture(self) -> str:
        """Return the map drawn in at most 80 columns: a line a student layer, a column a teacher layer.

        `·` is no weight, `░ ▒ ▓ █` are weights up to 1/4, 1/2, 3/4 and 1. Of a teacher with more layers than columns,
        neighbours share a column, which shows their sum.
        """
        columns = _columns(self.weights, PICTURE_WIDTH)
        sums = torch.stack([part.sum(1) for part in columns], dim=1)
        return _drawn(self.strategy, self.weights, sums, PICTURE_WIDTH, [""] * len(sums))


def similarity_picture(name: str, similarity: Tensor) -> str:
    """Return a similarity [student layers, teacher layers] drawn in at most 80 columns, as a layer map is.

    From `·`, the least, to `█`, the greatest, in equal steps; of neighbours that share a column the greatest. Beside
    each row are its greatest value and the teacher layer that has it.
    """
    matrix = similarity.detach().to("cpu", torch.float64)
    least, most = float(matrix.min()), float(matrix.max())
    best = matrix.max(1)
    width = PICTURE_WIDTH - len(BESIDE.format(0.0, matrix.shape[1] - 1))
    highest = torch.stack([part.amax(1) for part in _columns(matrix, width)], dim=1)
    # Without a spread all are the least.
    shares = (highest - least) / (most - least) if most > least else torch.zeros_like(highest)
    beside = [
        BESIDE.format(value, layer) for value, layer in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return _drawn(f"{name}, {least:.2f} · to {most:.2f} █", matrix, shares, width, beside)


def _columns(matrix: Tensor, width: int) -> tuple[Tensor, ...]:
    """Return the columns of a picture, each one or more neighbouring columns of the matrix."""
    return matrix.split(-(-matrix.shape[1] // (width - _margin(matrix))), dim=1)


def _margin(matrix: Tensor) -> int:
    return max(len(str(matrix.shape[0] - 1)), 2) + 1


def _drawn(name: str, matrix: Tensor, shares: Tensor, width: int, beside: Sequence[str]) -> str:
    """Return a picture of `shares` [student layers, columns], each 0 to 1, with what stands beside each row."""
    margin, group = _margin(matrix), -(-matrix.shape[1] // (width - _margin(matrix)))
    title = f"{name}: student layers down, teacher layers across" + (f", {group} to a column" if group > 1 else "")
    lines = [title, " " * margin + _ruler(range(0, matrix.shape[1], group), width - margin)]
    for student, (row, more) in enumerate(zip(shares.tolist(), beside, strict=True)):
        lines.append(f"{student:>{margin - 1}} " + "".join(map(_shade, row)) + more)
    return "\n".join(line.rstrip() for line in lines)


def usage_entropy(weights: Tensor) -> Tensor:
    """Return the entropy, in nats, of how rows that sum to 1 use the columns on average: a scalar with a gradient."""
    usage = weights.mean(0)
    # The slope of log at 0 is infinite, and rows that are nearly one-hot underflow to 0.
    return -(usage * usage.clamp_min(torch.finfo(usage.dtype).tiny).log()).sum()


def check_depths(strategy: str, student_layers: int, teacher_layers: int) -> None:
    """Raise UsageError unless both models have a block."""
    if student_layers < 1 or teacher_layers < 1:
        raise UsageError(
            f"layers: {strategy} needs at least one block on both sides",
            found=f"{student_layers} student blocks, {teacher_layers} teacher blocks",
        )


def _shade(weight: float) -> str:
    # Rounded, so that three weights of a third, summed, are not above 1.
    return SHADES[min(int(-(-round(weight * 4, 6) // 1)), 4) - 1] if weight > 5e-7 else "·"


def _ruler(starts: range, width: int) -> str:
    """Return the layer at which each fifth column starts, where there is room for its number."""
    line = ""
    for column in range(0, len(starts), 5):
        label = str(starts[column])
        if column >= len(line) and column + len(label) <= width:
            line = line.ljust(column) + label
    return line
