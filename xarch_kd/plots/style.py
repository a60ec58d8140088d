"""Look of all figures, and their form as SVG that follows the colors of the page around it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Final

from xarch_kd.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Width in inches of a figure of one panel. It is shown at about 350 pixels, so that 8 points are readable on a phone.
WIDTH: Final = 3.6
# Role → color on a light page. An SVG inside a page has `var(--role)` instead, which the page defines for both schemes.
COLORS: Final[dict[str, str]] = {
    "ink": "#1c1f24",
    "muted": "#667080",
    "grid": "#dfe3e8",
    "surface": "#fdfdfe",
    "teacher": "#c4561b",
    "student": "#1f6feb",
    "green": "#2a8f5b",
    "purple": "#8250df",
    "pink": "#bf3989",
    "teal": "#0f828c",
    "gold": "#9a6b00",
}
# Colors of curves that are neither the teacher's nor the student's, in this order.
SERIES: Final = ("student", "teacher", "green", "purple", "pink", "teal", "gold", "muted")
_ROLES: Final = {color: role for role, color in COLORS.items()}
_STYLE: Final[dict[Any, Any]] = {
    "axes.axisbelow": True,
    "axes.edgecolor": COLORS["muted"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": COLORS["muted"],
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": COLORS["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.facecolor": "none",
    "font.size": 8,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.labelcolor": COLORS["ink"],
    "lines.linewidth": 1.4,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": COLORS["ink"],
    # Names of runs, stages and texts are shown as they are, dollar signs included.
    "text.parse_math": False,
    "xtick.color": COLORS["muted"],
    "xtick.labelsize": 8,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.color": COLORS["muted"],
    "ytick.labelsize": 8,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
}
LABEL_LENGTH: Final = 40


@contextmanager
def house_style() -> Iterator[None]:
    """Draw figures with these colors and sizes inside the block.

    Characters that matplotlib's own font lacks are no warning: a page shows them in the reader's font.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
        yield


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = 2.4, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `width` × `height` inches and its axes, row by row; `options` are those of `subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def label(text: object, limit: int = LABEL_LENGTH) -> str:
    """Return text for a label: one line, control characters escaped, cut to `limit` characters."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def series_color(index: int) -> str:
    """Return the color of a curve by its number."""
    return COLORS[SERIES[index % len(SERIES)]]


def plain_log_ticks(axis: Any) -> None:
    """Label the ticks of a logarithmic axis with plain numbers, a few at most."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value >= 1 else f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def as_svg(figure: Figure, *, name: str, alternative: str) -> str:
    """Return a figure as an SVG element for a page, with `alternative` as its text for readers who do not see it.

    `name` makes its ids unique in the page. Colors are `var(--role)` for the roles of `COLORS`, fonts are the page's.
    """
    buffer = io.StringIO()
    with house_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style\b.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'style="([^"]*)"', lambda found: f'style="{_themed(found[1])}"', text)
    # Only what is referred to needs an id.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(?<=\s)id="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    width, height = (72 * float(size) for size in figure.get_size_inches())
    described = escape(printable(alternative), quote=True)
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{described}">'
    return re.sub(r"<svg\b[^>]*>", lambda _: opening, text, count=1).strip()


def _themed(style: str) -> str:
    """Return a style attribute with roles in place of colors, and without font families."""
    style = re.sub(
        r"#[0-9a-f]{6}", lambda found: f"var(--{_ROLES[found[0]]})" if found[0] in _ROLES else found[0], style
    )
    return re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", re.sub(r"font-family: [^;]*;?", "", style))
