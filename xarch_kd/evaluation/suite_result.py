"""Result of a suite of figures, curves and texts: its JSON, its table and its lines of a model card."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

# A value that is better where it is lower, higher, or nearer to the teacher's own.
Better = Literal["lower", "higher", "teacher"]
# `value` is student - teacher, student / teacher, an excess over what is expected, or a number of its own.
Compared = Literal["difference", "ratio", "excess", "value"]
Bound = float | None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of teacher and student, and what compares them.

    `value` compares the models as `compared` names, with the interval `low` to `high`; `ceiling` is the same number of
    the teacher against itself. `count` is the number of independent units, named by `of`. None: not known.
    """

    name: str
    better: Better
    compared: Compared
    value: float | None
    unit: str = ""
    teacher: float | None = None
    student: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    ceiling: float | None = None
    count: int = 0
    of: str = "prompts"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Lines over the common values `at` of `x`, in `unit`; `bands` are intervals of some lines, None where unknown."""

    name: str
    x: str
    at: tuple[float, ...]
    lines: Mapping[str, tuple[float | None, ...]]
    bands: Mapping[str, tuple[tuple[Bound, Bound], ...]] = field(default_factory=dict)
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """A prompt and what each model wrote after it."""

    prompt: str
    teacher: str
    student: str


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """Figures, curves and texts of a suite; `signature` names everything that can change the numbers."""

    signature: str
    figures: tuple[Figure, ...]
    curves: tuple[Curve, ...] = ()
    samples: tuple[TextPair, ...] = ()
    notices: tuple[str, ...] = ()

    def figure(self, name: str) -> Figure:
        """Return the figure of that name. Raises KeyError."""
        return {each.name: each for each in self.figures}[name]

    def curve(self, name: str) -> Curve:
        """Return the curve of that name. Raises KeyError."""
        return {each.name: each for each in self.curves}[name]


def finite(value: float | None) -> float | None:
    """Return a value, or None if it is NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def line(values: Any) -> tuple[float | None, ...]:
    """Return numbers as a line of a curve, None where they are not finite."""
    return tuple(finite(float(value)) for value in values)


def band(low: Any, high: Any) -> tuple[tuple[Bound, Bound], ...]:
    """Return lower and upper bounds as a band of a curve."""
    return tuple(zip(line(low), line(high), strict=True))


def signature_text(name: str, version: int, parts: Mapping[str, object]) -> str:
    """Return the signature of a result: the estimator's version, and the settings in order."""
    return "|".join([f"{name}.v{version}", *(f"{key}:{value}" for key, value in parts.items())])


def result_from_json(data: Mapping[str, Any]) -> SuiteResult:
    """Return what `dataclasses.asdict` was given. Raises KeyError and TypeError for something else."""
    return SuiteResult(
        signature=data["signature"],
        figures=tuple(Figure(**each) for each in data["figures"]),
        curves=tuple(_curve(each) for each in data["curves"]),
        samples=tuple(TextPair(**each) for each in data["samples"]),
        notices=tuple(data["notices"]),
    )


def result_to_json(result: SuiteResult) -> dict[str, Any]:
    """Return a result as JSON data."""
    return dataclasses.asdict(result)


def _curve(data: Mapping[str, Any]) -> Curve:
    return Curve(
        name=data["name"],
        x=data["x"],
        unit=data["unit"],
        at=tuple(data["at"]),
        lines={name: tuple(values) for name, values in data["lines"].items()},
        bands={name: tuple((low, high) for low, high in values) for name, values in data["bands"].items()},
    )


HEADINGS = ("figure", "teacher", "student", "student against teacher", "interval", "teacher against itself", "n")


def result_tables(title: str, result: SuiteResult) -> Iterator[RenderableType]:
    """Yield a table of the figures, and the notices."""
    table = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "figure" else "right", overflow="fold")
    for figure in result.figures:
        table.add_row(*map(Text, cells(figure)))
    yield table
    for notice in result.notices:
        yield Text(notice)


def result_markdown(title: str, result: SuiteResult) -> Iterator[str]:
    """Yield the lines of a table for a model card."""
    yield f"{title}:"
    yield ""
    yield "| " + " | ".join(HEADINGS) + " |"
    yield "|---" * len(HEADINGS) + "|"
    for figure in result.figures:
        yield "| " + " | ".join(cells(figure)) + " |"
    yield ""
    yield f"`{result.signature}`"


def cells(figure: Figure) -> tuple[str, ...]:
    """Return the cells of one row, under `HEADINGS`."""
    interval = (
        "" if figure.low is None or figure.high is None else f"{_of(figure, figure.low)} to {_of(figure, figure.high)}"
    )
    return (
        figure.name,
        _number(figure.teacher),
        _number(figure.student),
        "" if figure.value is None else _of(figure, figure.value),
        interval,
        "" if figure.ceiling is None else _of(figure, figure.ceiling),
        f"{figure.count:,} {figure.of}" if figure.count else "",
    )


def _of(figure: Figure, value: float) -> str:
    sign = "+" if figure.compared in ("difference", "excess") else ""
    prefix = "× " if figure.compared == "ratio" else ""
    return f"{prefix}{value:{sign}.4g}{' ' + figure.unit if figure.unit else ''}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
