"""Curves in a terminal: lines of braille dots, and sparklines of blocks; ASCII where there are no such characters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from rich.text import Text

# Bits of a braille character by row and column of its 4 x 2 dots.
DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
BLANK: Final = 0x2800
BLOCKS: Final = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS: Final = "_.-=+*%#"
# Beyond this ratio of the largest to the smallest value the axis is logarithmic.
LOG_RATIO: Final = 10.0
LABEL_WIDTH: Final = 9


def curve_plot(
    line: Mapping[int, float],
    marks: Mapping[int, float],
    *,
    last: int,
    width: int,
    height: int,
    mark: str = "o",
    ascii_only: bool = False,
) -> Text:
    """Return a plot of `height` lines of at most `width` characters: a line by step, and single `marks` on top of it.

    Steps run from 1 to `last`. Values that share a column are averaged. The axis is logarithmic where positive values
    span more than a factor of 10; its ends are labelled, and below them the first and the last step.
    """
    values = [*line.values(), *marks.values()]
    columns = max(width - LABEL_WIDTH - 2, 4)
    scale = _Scale(values)
    cells = [[0] * columns for _ in range(height)]
    dots = _averages(line, last, 2 * columns)
    _draw(cells, [(column, scale.place(value, 4 * height)) for column, value in dots])
    shown = [[_character(mask, ascii_only) for mask in row] for row in cells]
    for column, value in _averages(marks, last, columns):
        shown[scale.place(value, height)][column] = mark
    text = Text()
    labels = {0: scale.label(scale.high), height - 1: scale.label(scale.low)}
    wall = "|" if ascii_only else "│"
    for number, row in enumerate(shown):
        text.append(f"{labels.get(number, ''):>{LABEL_WIDTH}} {wall}", style="dim")
        for character in row:
            text.append(character, style="yellow" if character == mark else "cyan")
        text.append("\n")
    axis = f"1{f'step {last}':>{columns - 1}}"
    text.append(f"{'log' if scale.is_log else '':>{LABEL_WIDTH}}  {axis}", style="dim")
    return text


def sparkline(curve: Mapping[int, float], *, width: int, ascii_only: bool = False) -> str:
    """Return a curve by step as one line of at most `width` blocks."""
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    if not curve:
        return ""
    scale = _Scale(list(curve.values()))
    points = _averages({number + 1: curve[step] for number, step in enumerate(sorted(curve))}, len(curve), width)
    return "".join(blocks[len(blocks) - 1 - scale.place(value, len(blocks))] for _, value in points)


class _Scale:
    """Places of values on an axis, linear or logarithmic."""

    def __init__(self, values: Sequence[float]) -> None:
        self.low, self.high = (min(values), max(values)) if values else (0.0, 1.0)
        self.is_log = self.low > 0 and self.high / self.low > LOG_RATIO

    def place(self, value: float, places: int) -> int:
        """Return the place of a value, 0 for the largest and `places - 1` for the smallest."""
        low, high, at = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        share = (high - at) / (high - low) if high > low else 0.5
        return min(places - 1, max(0, round(share * (places - 1))))

    def label(self, value: float) -> str:
        """Return a value in at most LABEL_WIDTH characters."""
        return f"{value:.4g}"[:LABEL_WIDTH]


def _averages(curve: Mapping[int, float], last: int, columns: int) -> list[tuple[int, float]]:
    """Return the mean of the values in each column, of those columns that have any."""
    sums: dict[int, tuple[float, int]] = {}
    for step, value in curve.items():
        # With fewer steps than columns they are spread over the whole width.
        column = min(columns - 1, round((step - 1) / max(last - 1, 1) * (columns - 1)))
        total, count = sums.get(column, (0.0, 0))
        sums[column] = (total + value, count + 1)
    return [(column, total / count) for column, (total, count) in sorted(sums.items())]


def _draw(cells: list[list[int]], dots: Sequence[tuple[int, int]]) -> None:
    """Set the dots of a line through these points, (column, row)."""
    for start, stop in zip(dots, dots[1:] or dots, strict=False):
        length = max(abs(stop[0] - start[0]), abs(stop[1] - start[1]), 1)
        for part in range(length + 1):
            column = round(start[0] + (stop[0] - start[0]) * part / length)
            row = round(start[1] + (stop[1] - start[1]) * part / length)
            cells[row // 4][column // 2] |= DOTS[row % 4][column % 2]


def _character(mask: int, ascii_only: bool) -> str:
    if mask == 0:
        return " "
    return "*" if ascii_only else chr(BLANK + mask)
