"""Result of an evaluation: one field per suite, its JSON, and its tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from xarch_kd.errors import DataError
from xarch_kd.evaluation.copying import CopyingResult
from xarch_kd.evaluation.likelihood_suite import COLUMNS, LikelihoodResult, likelihood_cells, likelihood_footnote
from xarch_kd.evaluation.registry import SUITES
from xarch_kd.evaluation.speed_suite import SpeedResult
from xarch_kd.files import write_text

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of each suite of `SUITES`, in a field of its name; empty or None for one that was not measured.

    `level`, `resamples` and `seed` are those of the intervals. Texts are in the given order.
    """

    teacher: str
    student: str
    level: float
    resamples: int
    seed: int
    likelihood: tuple[LikelihoodResult, ...] = ()
    copying: CopyingResult | None = None
    speed: SpeedResult | None = None

    def result(self, text: str) -> LikelihoodResult:
        """Return the likelihood on the text of that name."""
        for result in self.likelihood:
            if result.text == text:
                return result
        raise DataError(
            "The evaluation has no such text.",
            asked=text,
            allowed=" | ".join(result.text for result in self.likelihood),
        )

    def measured(self) -> Iterator[str]:
        """Yield the names of the suites that were measured, in the order of `SUITES`."""
        yield from (name for name in SUITES if getattr(self, name))


def to_json(evaluation: Evaluation) -> str:
    """Return the evaluation as indented JSON, perplexities included, ending with a newline."""
    data = {field.name: getattr(evaluation, field.name) for field in dataclasses.fields(evaluation)}
    measured = set(evaluation.measured())
    for name, suite in SUITES.items():
        data[name] = suite.to_json(data[name]) if name in measured else None
    return json.dumps({"format": FORMAT, **data}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str, *, source: str = "evaluation") -> Evaluation:
    """Return the evaluation that `to_json` wrote. Raises DataError when it is something else."""
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise DataError(f"{source} has another format.", found=data["format"], allowed=FORMAT)
        values: dict[str, Any] = {
            field.name: data[field.name] for field in dataclasses.fields(Evaluation) if field.name not in SUITES
        }
        for name, suite in SUITES.items():
            if data.get(name) is not None:
                values[name] = suite.from_json(data[name])
        return Evaluation(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source} is not an evaluation.", found=f"{type(error).__name__}: {error}") from None


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write the evaluation to `path`, whole or not at all. Raises CheckpointError if it cannot be written."""
    write_text(path, to_json(evaluation))


def read_evaluation(path: Path) -> Evaluation:
    """Read what `write_evaluation` wrote. Raises DataError when the file is missing or something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("The evaluation cannot be read.", asked=path, found=error) from None
    return from_json(text, source=str(path))


def render(evaluation: Evaluation) -> Group:
    """Return the tables of all suites that were measured."""
    return Group(*(table for name in evaluation.measured() for table in SUITES[name].tables(evaluation)))


def render_markdown(evaluation: Evaluation) -> str:
    """Return the results as the Markdown of a model card."""
    return "\n\n".join("\n".join(SUITES[name].markdown(evaluation)) for name in evaluation.measured())


def render_plain(evaluation: Evaluation) -> str:
    """Return likelihood and copying as plain text, one paragraph per text, for logs."""
    lines = []
    for cells in likelihood_cells(evaluation):
        lines.append(f"{cells[0]}: {cells[1]}" if cells[1] else cells[0])
        lines += [f"  {heading}: {cell}" for heading, cell in zip(COLUMNS[2:], cells[2:], strict=True)]
    copying = [] if evaluation.copying is None else [evaluation.copying.line()]
    return "\n".join([*lines, likelihood_footnote(evaluation), *copying])
