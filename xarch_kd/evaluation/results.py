"""Results of an evaluation by suite, their JSON, and their tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group

from xarch_kd.errors import DataError
from xarch_kd.evaluation.likelihood_suite import COLUMNS, LikelihoodResult, likelihood_cells, likelihood_footnote
from xarch_kd.evaluation.registry import SUITES
from xarch_kd.evaluation.speed_suite import SpeedResult
from xarch_kd.files import write_text

FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results by name of the suite, in the order of `SUITES`, without those that were not measured.

    `level`, `resamples` and `seed` are those of the intervals. Texts are in the given order.
    """

    teacher: str
    student: str
    level: float
    resamples: int
    seed: int
    results: Mapping[str, Any] = field(default_factory=dict)

    @property
    def likelihood(self) -> tuple[LikelihoodResult, ...]:
        """The likelihood on each text, empty if it was not measured."""
        return self.results.get("likelihood", ())

    @property
    def speed(self) -> SpeedResult | None:
        """Bytes and times, None if they were not measured."""
        return self.results.get("speed")

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
        yield from (name for name in SUITES if name in self.results)


def to_json(evaluation: Evaluation) -> str:
    """Return the evaluation as indented JSON, perplexities included, ending with a newline."""
    data = {
        "format": FORMAT,
        **{name: getattr(evaluation, name) for name in _FIELDS},
        "results": {name: SUITES[name].to_json(evaluation.results[name]) for name in evaluation.measured()},
    }
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str, *, source: str = "evaluation") -> Evaluation:
    """Return the evaluation that `to_json` wrote. Raises DataError when it is something else."""
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise DataError(
                f"{source} has another format.",
                found=data["format"],
                allowed=FORMAT,
                fix="measure again: xarch-kd evaluate RUN",
            )
        results = {
            name: suite.from_json(data["results"][name]) for name, suite in SUITES.items() if name in data["results"]
        }
        unknown = sorted(set(data["results"]) - set(SUITES))
        if unknown:
            raise DataError(
                f"{source} has results of unknown suites.", found=", ".join(unknown), allowed=", ".join(SUITES)
            )
        return Evaluation(**{name: data[name] for name in _FIELDS}, results=results)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source} is not an evaluation.", found=f"{type(error).__name__}: {error}") from None


_FIELDS = ("teacher", "student", "level", "resamples", "seed")


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
    """Return the likelihood as plain text, one paragraph per text, for logs."""
    lines = []
    for cells in likelihood_cells(evaluation):
        lines.append(f"{cells[0]}: {cells[1]}" if cells[1] else cells[0])
        lines += [f"  {heading}: {cell}" for heading, cell in zip(COLUMNS[2:], cells[2:], strict=True)]
    return "\n".join([*lines, likelihood_footnote(evaluation)])
