"""Results of an evaluation: dataclasses, their JSON, and their table."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from xarch_kd.errors import DataError
from xarch_kd.evaluation.copying import CopyingResult
from xarch_kd.files import write_text

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PositionResult:
    """Mean NLL, in nats, of tokens with at least `start` and fewer than `stop` tokens before them in their row."""

    start: int
    stop: int
    teacher_nll: float
    student_nll: float


@dataclass(frozen=True, kw_only=True)
class LikelihoodResult:
    """Teacher and student on the same tokens of one text, in nats per token.

    `text` is its name and `description` its kind: held-out text of the training corpus, or another kind of text.
    `difference` is student - teacher, `low` and `high` its bootstrap interval over rows; they and `p_value` are None
    for a single row. `fingerprint` is a hash of the tokens.
    """

    text: str
    description: str
    rows: int
    tokens: int
    fingerprint: str
    teacher_nll: float
    student_nll: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    by_position: tuple[PositionResult, ...]

    @property
    def teacher_perplexity(self) -> float:
        """Return exp of the teacher's NLL."""
        return _exp(self.teacher_nll)

    @property
    def student_perplexity(self) -> float:
        """Return exp of the student's NLL."""
        return _exp(self.student_nll)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of all texts in the given order, and of copying, with the settings of the intervals."""

    teacher: str
    student: str
    level: float
    resamples: int
    seed: int
    likelihood: tuple[LikelihoodResult, ...]
    copying: CopyingResult | None = None

    def result(self, text: str) -> LikelihoodResult:
        """Return the result of the text of that name."""
        for result in self.likelihood:
            if result.text == text:
                return result
        raise DataError(
            "The evaluation has no such text.",
            asked=text,
            allowed=" | ".join(result.text for result in self.likelihood),
        )


def to_json(evaluation: Evaluation) -> str:
    """Return the evaluation as indented JSON, perplexities included, ending with a newline."""
    data = dataclasses.asdict(evaluation)
    for entry, result in zip(data["likelihood"], evaluation.likelihood, strict=True):
        entry["teacher_perplexity"] = _finite(result.teacher_perplexity)
        entry["student_perplexity"] = _finite(result.student_perplexity)
    return json.dumps({"format": FORMAT, **data}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str, *, source: str = "evaluation") -> Evaluation:
    """Return the evaluation that `to_json` wrote. Raises DataError when it is something else."""
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise DataError(f"{source} has another format.", found=data["format"], allowed=FORMAT)
        values = _fields(Evaluation, data)
        values["likelihood"] = tuple(_likelihood(entry) for entry in data["likelihood"])
        values["copying"] = None if data["copying"] is None else CopyingResult(**data["copying"])
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
    """Return the evaluation as rich tables: one row per text, then NLL by position."""
    table = Table(title="Likelihood on the same tokens (nats per token)", title_justify="left")
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading in COLUMNS[:2] else "right", overflow="fold")
    for cells in _cells(evaluation):
        table.add_row(*map(Text, cells))
    curves = Table(title="Student minus teacher, by tokens of context", title_justify="left")
    curves.add_column("text", overflow="fold")
    buckets = list(dict.fromkeys(_range(part) for result in evaluation.likelihood for part in result.by_position))
    for bucket in buckets:
        curves.add_column(bucket, justify="right")
    for result in evaluation.likelihood:
        gaps = {_range(part): f"{part.student_nll - part.teacher_nll:+.3f}" for part in result.by_position}
        curves.add_row(Text(result.text), *(gaps.get(bucket, "") for bucket in buckets))
    copying = [] if evaluation.copying is None else [Text(evaluation.copying.line())]
    return Group(table, Text(_footnote(evaluation)), curves, *copying)


def render_plain(evaluation: Evaluation) -> str:
    """Return the evaluation as plain text, one paragraph per text, for logs and model cards."""
    lines = []
    for cells in _cells(evaluation):
        lines.append(f"{cells[0]}: {cells[1]}" if cells[1] else cells[0])
        lines += [f"  {heading}: {cell}" for heading, cell in zip(COLUMNS[2:], cells[2:], strict=True)]
    copying = [] if evaluation.copying is None else [evaluation.copying.line()]
    return "\n".join([*lines, _footnote(evaluation), *copying])


COLUMNS = ("text", "kind", "tokens", "teacher", "student", "difference", "interval", "perplexity")


def _cells(evaluation: Evaluation) -> list[tuple[str, ...]]:
    return [
        (
            result.text,
            result.description,
            f"{result.tokens:,}",
            f"{result.teacher_nll:.3f}",
            f"{result.student_nll:.3f}",
            f"{result.difference:+.3f}",
            "one row: none"
            if result.low is None or result.high is None
            else f"{result.low:+.3f} to {result.high:+.3f}",
            f"{result.teacher_perplexity:.2f} → {result.student_perplexity:.2f}",
        )
        for result in evaluation.likelihood
    ]


def _footnote(evaluation: Evaluation) -> str:
    return (
        f"difference: student - teacher; interval: {evaluation.level:.0%}, paired bootstrap over rows, "
        f"{evaluation.resamples} resamples, seed {evaluation.seed}"
    )


def _range(part: PositionResult) -> str:
    return str(part.start) if part.stop == part.start + 1 else f"{part.start}-{part.stop - 1}"


def _likelihood(entry: dict[str, Any]) -> LikelihoodResult:
    values = _fields(LikelihoodResult, entry)
    values["by_position"] = tuple(PositionResult(**part) for part in entry["by_position"])
    return LikelihoodResult(**values)


def _fields(kind: type, data: dict[str, Any]) -> dict[str, Any]:
    return {field.name: data[field.name] for field in dataclasses.fields(kind)}


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
