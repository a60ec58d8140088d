"""Text and HTML forms of what a session shows: at most 30 lines for a prompt, everything escaped for a notebook."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from xarch_kd.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

MAXIMUM_LINES = 30
WIDTH = 120


class AsIs:
    """A rich renderable that is shown as it is: no markup in its text, and control characters escaped."""

    def __init__(self, renderable: RenderableType) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.renderable, options.update(markup=False)):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def shortened_lines(text: str, *, more: str, limit: int = MAXIMUM_LINES) -> str:
    """Return at most `limit` lines of `text`; if lines are left out, the last one is their number."""
    lines = [line.rstrip() for line in text.rstrip().splitlines()]
    if len(lines) <= limit:
        return "\n".join(lines)
    return "\n".join([*lines[: limit - 1], f"… {len(lines) - limit + 1} more lines: {more}"])


def as_text(renderable: RenderableType, *, more: str) -> str:
    """Return a rich renderable as plain text of at most 30 lines, as a `repr` is."""
    from rich.console import Console

    console = Console(
        file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False, emoji=False
    )
    with console.capture() as captured:
        console.print(AsIs(renderable), highlight=False)
    return shortened_lines(captured.get(), more=more)


def as_html(renderable: RenderableType) -> str:
    """Return a rich renderable as HTML for a notebook."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False, emoji=False)
    console.print(AsIs(renderable), highlight=False)
    return console.export_html(code_format='<pre style="line-height: 1.2">{code}</pre>', inline_styles=True)


def preformatted(text: str) -> str:
    """Return plain text as HTML for a notebook."""
    return f'<pre style="line-height: 1.2">{html.escape(text)}</pre>'


def ranges(indices: Iterable[int]) -> str:
    """Return indices in few characters: `0-3, 7`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def byte_text(count: float) -> str:
    """Return bytes in words: `540 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Return a rough time in words: `40 s`, `3 min`, `2.5 h`."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count_text(count: float) -> str:
    """Return a count with a suffix: `6.70 M`."""
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return f"{count / limit:.2f}{suffix}"
    return f"{count:.0f}"
