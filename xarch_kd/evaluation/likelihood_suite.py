"""Suite `likelihood`: negative log-likelihood of both models on the same tokens, with paired intervals."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from xarch_kd.data.batches import Batch
from xarch_kd.errors import DataError
from xarch_kd.evaluation.base import Subjects
from xarch_kd.evaluation.distributions import measure_distributions
from xarch_kd.evaluation.likelihood import batches_of, position_buckets, position_curve, token_nll
from xarch_kd.evaluation.statistics import PairedDifference, paired_bootstrap
from xarch_kd.evaluation.suite_result import SuiteResult, result_from_json, result_markdown, result_tables
from xarch_kd.losses.tokens import IGNORED_LABEL

if TYPE_CHECKING:
    from xarch_kd.evaluation.results import Evaluation


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
    for a single row. `fingerprint` is a hash of the tokens. `row_tokens` and `row_nll` are the tokens of each row and
    the sum of the student's NLL over them, by which students are compared. `details` compares the distributions
    themselves, on the first text alone.
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
    row_tokens: tuple[int, ...] = ()
    row_nll: tuple[float, ...] = ()
    details: SuiteResult | None = None

    @property
    def teacher_perplexity(self) -> float:
        """Return exp of the teacher's NLL."""
        return _exp(self.teacher_nll)

    @property
    def student_perplexity(self) -> float:
        """Return exp of the student's NLL."""
        return _exp(self.student_nll)


def measure_likelihood(subjects: Subjects) -> tuple[LikelihoodResult, ...]:
    """Return the likelihood of both models on each text, with a paired interval of the difference.

    Raises DataError without a text, NonFiniteLoss for a likelihood that is NaN or infinite.
    """
    if not subjects.texts:
        raise DataError("There is no text to measure.", found="an empty mapping", allowed="name -> rows [rows, T]")
    unknown = sorted(set(subjects.descriptions) - set(subjects.texts))
    if unknown:
        raise DataError("A description has no text.", found=", ".join(unknown), allowed=" | ".join(subjects.texts))
    found = []
    models = (
        (subjects.teacher, "teacher", subjects.teacher_paths),
        (subjects.student, "student", subjects.student_paths),
    )
    for name, batches in subjects.texts.items():
        tokens = sum(batch.tokens for batch in batches)
        nll = {}
        for model, words, paths in models:
            with subjects.reporter.work(f"measuring {name}, {words}", tokens, "tokens") as work:
                nll[words] = token_nll(model, batches, paths=paths, progress=work.at)
        difference = paired_bootstrap(
            nll["teacher"],
            nll["student"],
            level=subjects.level,
            resamples=subjects.resamples,
            seed=subjects.seed,
        )
        description = subjects.descriptions.get(name, "")
        found.append(_result(name, description, batches, nll["teacher"], nll["student"], difference))
    found[0] = dataclasses.replace(found[0], details=measure_distributions(subjects))
    return tuple(found)


def likelihood_to_json(results: Sequence[LikelihoodResult]) -> list[dict[str, Any]]:
    """Return the results as JSON data, perplexities included."""
    return [
        {
            **dataclasses.asdict(result),
            "teacher_perplexity": _finite(result.teacher_perplexity),
            "student_perplexity": _finite(result.student_perplexity),
        }
        for result in results
    ]


def likelihood_from_json(data: Any) -> tuple[LikelihoodResult, ...]:
    """Return what `likelihood_to_json` was given. Raises KeyError and TypeError for something else."""
    return tuple(_likelihood(entry) for entry in data)


def likelihood_tables(evaluation: Evaluation) -> Iterator[RenderableType]:
    """Yield a table of one row per text, a footnote, and a table of the difference by position."""
    table = Table(title="Likelihood on the same tokens (nats per token)", title_justify="left")
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading in COLUMNS[:2] else "right", overflow="fold")
    for cells in likelihood_cells(evaluation):
        table.add_row(*map(Text, cells))
    yield table
    yield Text(likelihood_footnote(evaluation))
    curves = Table(title="Student minus teacher, by tokens of context", title_justify="left")
    curves.add_column("text", overflow="fold")
    buckets = list(dict.fromkeys(_range(part) for result in evaluation.likelihood for part in result.by_position))
    for bucket in buckets:
        curves.add_column(bucket, justify="right")
    for result in evaluation.likelihood:
        gaps = {_range(part): f"{part.student_nll - part.teacher_nll:+.3f}" for part in result.by_position}
        curves.add_row(Text(result.text), *(gaps.get(bucket, "") for bucket in buckets))
    yield curves
    for result in evaluation.likelihood:
        if result.details is not None:
            yield from result_tables(f"Distributions on {result.text}", result.details)


def likelihood_markdown(evaluation: Evaluation) -> Iterator[str]:
    """Yield the lines of a table for a model card."""
    yield "| text | tokens | teacher NLL | student NLL | difference (95 % interval) |"
    yield "|---|---|---|---|---|"
    for result in evaluation.likelihood:
        interval = "" if result.low is None or result.high is None else f" ({result.low:+.4f} to {result.high:+.4f})"
        yield (
            f"| {result.text} ({result.description}) | {result.tokens:,} | {result.teacher_nll:.4f} "
            f"| {result.student_nll:.4f} | {result.difference:+.4f}{interval} |"
        )
    yield ""
    yield "Nats per token; the interval is a paired bootstrap over rows."
    for result in evaluation.likelihood:
        if result.details is not None:
            yield ""
            yield from result_markdown(f"Distributions on {result.text}", result.details)


COLUMNS = ("text", "kind", "tokens", "teacher", "student", "difference", "interval", "perplexity")


def likelihood_cells(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Return the cells of one row per text, under `COLUMNS`."""
    return [
        (
            result.text,
            # That of a mixture has a line for each source; the file of the evaluation has all of it.
            textwrap.shorten(result.description, 60, placeholder=" …"),
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


def likelihood_footnote(evaluation: Evaluation) -> str:
    """Return what the difference and the interval are."""
    return (
        f"difference: student - teacher; interval: {evaluation.level:.0%}, paired bootstrap over rows, "
        f"{evaluation.resamples} resamples, seed {evaluation.seed}"
    )


def _range(part: PositionResult) -> str:
    return str(part.start) if part.stop == part.start + 1 else f"{part.start}-{part.stop - 1}"


def _likelihood(entry: dict[str, Any]) -> LikelihoodResult:
    names = [field.name for field in dataclasses.fields(LikelihoodResult) if field.name != "details"]
    values = {name: entry[name] for name in names}
    details = entry.get("details")
    values["details"] = None if details is None else result_from_json(details)
    values["by_position"] = tuple(PositionResult(**part) for part in entry["by_position"])
    values |= {name: tuple(entry[name]) for name in ("row_tokens", "row_nll")}
    return LikelihoodResult(**values)


def _result(
    name: str,
    description: str,
    batches: Sequence[Batch],
    teacher: Tensor,
    student: Tensor,
    difference: PairedDifference,
) -> LikelihoodResult:
    return LikelihoodResult(
        text=name,
        description=description,
        rows=teacher.shape[0],
        tokens=int((~teacher.isnan()).sum()),
        fingerprint=token_fingerprint(batches),
        teacher_nll=float(teacher.double().nanmean()),
        student_nll=float(student.double().nanmean()),
        difference=difference.mean,
        low=difference.low,
        high=difference.high,
        p_value=difference.p_value,
        by_position=_positions(teacher, student),
        row_tokens=tuple((~student.isnan()).sum(1).tolist()),
        row_nll=tuple(student.double().nansum(1).tolist()),
    )


def token_fingerprint(rows: Tensor | Sequence[Batch]) -> str:
    """Return a hash of these rows of tokens, and of which of them count, 16 hexadecimal digits.

    It does not depend on how rows are divided into batches.
    """
    digest = hashlib.sha256()
    for batch in batches_of(rows, batch_size=max(1, len(rows))):
        counts = batch.next_tokens.cpu() != IGNORED_LABEL
        ids = batch.input_ids.cpu().to(torch.int64)
        lengths = [ids.shape[1]] * len(ids) if batch.attention_mask is None else batch.attention_mask.sum(1).tolist()
        for row, count, length in zip(ids, counts, lengths, strict=True):
            digest.update(f"{length}".encode() + row[:length].numpy().tobytes() + count[:length].numpy().tobytes())
    return digest.hexdigest()[:16]


def _positions(teacher: Tensor, student: Tensor) -> tuple[PositionResult, ...]:
    curves = zip(position_buckets(teacher.shape[1]), position_curve(teacher), position_curve(student), strict=True)
    return tuple(
        PositionResult(start=start, stop=stop, teacher_nll=first, student_nll=second)
        for (start, stop), first, second in curves
        if not math.isnan(first)
    )


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
