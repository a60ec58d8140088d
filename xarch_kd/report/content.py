"""Parts of a report: sections with figures, tables, texts side by side and lines, independent of HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure with its caption, and its description for readers who do not see it."""

    figure: Figure
    caption: str
    alternative: str
    kind: str = "picture"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a caption; columns whose heading starts with `>` are numbers."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = "table"

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """Each heading without its mark, and whether its column holds numbers."""
        return [(heading.removeprefix(">"), heading.startswith(">")) for heading in self.headings]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts of both models after the same prompts, side by side."""

    caption: str
    pairs: Sequence[tuple[str, str, str]]
    kind: str = "texts"


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Paragraphs, or a list."""

    lines: Sequence[str]
    as_list: bool = False
    kind: str = "lines"


@dataclass(frozen=True, kw_only=True)
class Folded:
    """Preformatted text that is shown on request."""

    caption: str
    text: str
    kind: str = "folded"


Item = Picture | Table | Texts | Lines | Folded


@dataclass(kw_only=True)
class Section:
    """A section of the page. One without items is left out."""

    name: str
    title: str
    note: str = ""
    items: list[Item] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """The section's id on the page."""
        return "section-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower())


def number(value: Any, *, sign: bool = False) -> str:
    """Return a number with four digits, `-` for none."""
    if value is None or isinstance(value, str | bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{value:+,.0f}" if sign else f"{value:,.0f}"
    return f"{value:+.4g}" if sign else f"{value:.4g}"


def interval(low: Any, high: Any, *, sign: bool = False) -> str:
    """Return both bounds of an interval, `-` without them."""
    return "-" if low is None or high is None else f"{number(low, sign=sign)} to {number(high, sign=sign)}"


def attempt(build: Callable[[], Section], otherwise: Callable[[], Section]) -> Section:
    """Return the section that `build` makes, or `otherwise` if the data is not of its form."""
    try:
        return build()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return otherwise()
