"""Comparison of runs that were evaluated alike: one row per run, and which differences are larger than chance."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np

from xarch_kd.errors import UsageError, suggest
from xarch_kd.evaluation.intervals import bootstrap, holm
from xarch_kd.evaluation.likelihood_suite import LikelihoodResult, likelihood_from_json
from xarch_kd.evaluation.statistics import LEVEL
from xarch_kd.report.read import Json, RunRecord, read_run

# Measures of cost, with their units.
COSTS: Final = {"tokens": "tokens", "flops": "FLOPs", "seconds": "s", "peak_bytes": "bytes"}
# The signature of times names the machine and both models, which may differ between runs.
OWN_SIGNATURE: Final = ("speed",)


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run: its measures by name, None where unknown, and those of them that are its cost."""

    name: str
    path: str
    measures: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class PairedRuns:
    """Difference second - first of two runs in one measure on the same rows, in nats per token.

    `adjusted` is the p-value adjusted for all comparisons by Holm's method. None: no row values, or a single row.
    """

    first: str
    second: str
    measure: str
    value: float
    low: float | None
    high: float | None
    p_value: float | None
    adjusted: float | None

    @property
    def is_real(self) -> bool:
        """True if the adjusted p-value is below 1 - level."""
        return self.adjusted is not None and self.adjusted < 1 - LEVEL


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs with the same evaluation signature, `signature` by field, and the differences of all pairs."""

    signature: Mapping[str, str]
    runs: tuple[ComparedRun, ...]
    pairs: tuple[PairedRuns, ...]

    @property
    def measures(self) -> list[str]:
        """Names of all measures, in the order of the first run."""
        return list(dict.fromkeys(name for run in self.runs for name in run.measures))

    def sorted_by(self, measure: str) -> Comparison:
        """Return the comparison with its runs in ascending order of a measure; unknown values are last.

        Raises UsageError for a measure that no run has.
        """
        if measure not in self.measures:
            raise UsageError(
                f"No run has the measure '{measure}'.{suggest(measure, self.measures)}",
                allowed=", ".join(self.measures),
            )

        def key(run: ComparedRun) -> float:
            value = run.measures.get(measure)
            return math.inf if value is None else value

        return Comparison(signature=self.signature, runs=tuple(sorted(self.runs, key=key)), pairs=self.pairs)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "signature": dict(self.signature),
            "runs": [asdict(run) for run in self.runs],
            "pairs": [{**asdict(pair), "is_real": pair.is_real} for pair in self.pairs],
        }

    def as_csv(self) -> str:
        """Return one line per run and one column per measure, as CSV."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["run", "path", *self.measures])
        for run in self.runs:
            values = [run.measures.get(name) for name in self.measures]
            table.writerow([run.name, run.path, *("" if value is None else value for value in values)])
        return text.getvalue()


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Return the comparison of at least two runs that were evaluated on the same inputs with the same settings.

    Students are compared in pairs on each text of the suite likelihood: the difference of their NLL, with a bootstrap
    interval over rows, and p-values adjusted by Holm's method over all pairs and texts.

    Raises UsageError for fewer than two runs, a folder without a run, a run that was not evaluated, and different
    signatures, with the fields that differ.
    """
    records = [read_run(path) for path in runs]
    return compare_records(records)


def compare_records(records: Sequence[RunRecord]) -> Comparison:
    """Return the comparison of runs that were read; errors as `compare`."""
    if len({record.folder.root.resolve() for record in records}) < max(2, len(records)):
        raise UsageError(
            "A comparison needs at least two different runs.",
            asked=", ".join(str(record.folder.root) for record in records) or "none",
        )
    missing = [record.folder.root for record in records if not record.results]
    if missing:
        raise UsageError(
            "These runs have no evaluation to compare.",
            found=", ".join(map(str, missing)),
            fix="\n           ".join(f"xarch-kd evaluate {path}" for path in missing),
        )
    signatures = [signature_of(record) for record in records]
    _check_signatures(records, signatures)
    names = _names(records)
    compared = tuple(
        ComparedRun(name=name, path=str(record.folder.root), measures=_measures(record))
        for name, record in zip(names, records, strict=True)
    )
    return Comparison(signature=signatures[0], runs=compared, pairs=tuple(_pairs(names, records)))


def signature_of(record: RunRecord) -> dict[str, str]:
    """Return what must be equal for two evaluations to be comparable, by field."""
    evaluation = record.evaluation
    # The seed is that of the resamples of intervals, which are drawn anew here.
    found = {key: str(evaluation.get(key)) for key in ("teacher", "level")}
    for suite, data in record.results.items():
        if suite == "likelihood":
            for text in _likelihood(data):
                found[f"likelihood, {text.text}"] = f"{text.fingerprint}, {text.rows} rows"
                if text.details is not None:
                    found[f"likelihood, {text.text}, details"] = text.details.signature
        elif suite not in OWN_SIGNATURE:
            found[suite] = str(data.get("signature")) if isinstance(data, Mapping) else "unknown"
    return found


def _check_signatures(records: Sequence[RunRecord], signatures: Sequence[Mapping[str, str]]) -> None:
    fields = list(dict.fromkeys(key for signature in signatures for key in signature))
    lines = []
    for field in fields:
        values = [signature.get(field, "not measured") for signature in signatures]
        if len(set(values)) > 1:
            shown = "; ".join(f"{record.folder.root}: {value}" for record, value in zip(records, values, strict=True))
            lines.append(f"{field}: {shown}")
    if lines:
        raise UsageError(
            "These runs were not evaluated alike, so that their figures cannot be compared.",
            found="\n           ".join(lines),
            fix="evaluate them with the same suites, texts, tokens and seed: xarch-kd evaluate RUN",
        )


def _names(records: Sequence[RunRecord]) -> list[str]:
    """Return the folders' names, whole paths where two have the same."""
    names = [record.name for record in records]
    return [
        name if names.count(name) == 1 else str(record.folder.root) for name, record in zip(names, records, strict=True)
    ]


def _likelihood(data: Any) -> tuple[LikelihoodResult, ...]:
    try:
        return likelihood_from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            "The likelihood of a run has no values of its rows, by which runs are compared.",
            found=f"{type(error).__name__}: {error}",
            fix="measure again: xarch-kd evaluate RUN",
        ) from None


def _measures(record: RunRecord) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for suite, data in record.results.items():
        if suite == "likelihood":
            for text in _likelihood(data):
                found[f"nll {text.text}"] = text.student_nll
                found[f"nll difference {text.text}"] = text.difference
        elif suite == "speed":
            found |= _speed_measures(data)
        else:
            found |= {f"{suite} {figure['name']}": _value(figure) for figure in data.get("figures") or ()}
    return found | {name: getattr(record, name) for name in COSTS}


def _speed_measures(data: Json) -> dict[str, float | None]:
    contexts = data.get("contexts") or ()
    return {f"cache bytes at {each['tokens']:,}": each["student"]["cache_bytes"] for each in contexts[-1:]}


def _value(figure: Json) -> float | None:
    """Return what compares student and teacher, else the student's own value."""
    return figure["student"] if figure.get("value") is None else figure["value"]


def _pairs(names: Sequence[str], records: Sequence[RunRecord]) -> Iterator[PairedRuns]:
    texts = [{text.text: text for text in _likelihood(record.results.get("likelihood") or ())} for record in records]
    made = []
    for text in texts[0]:
        for first, second in combinations(range(len(records)), 2):
            made.append(
                (names[first], names[second], f"nll {text}", *_difference(texts[first][text], texts[second][text]))
            )
    known = {str(index): p_value for index, (*_, p_value) in enumerate(made) if p_value is not None}
    adjusted = holm(known)
    for index, (first_name, second_name, measure, value, low, high, p_value) in enumerate(made):
        yield PairedRuns(
            first=first_name,
            second=second_name,
            measure=measure,
            value=value,
            low=low,
            high=high,
            p_value=p_value,
            adjusted=adjusted.get(str(index)),
        )


def _difference(
    first: LikelihoodResult, second: LikelihoodResult
) -> tuple[float, float | None, float | None, float | None]:
    """Return second - first per token, with its interval over rows and p-value."""
    tokens = np.asarray(first.row_tokens, dtype=np.float64)
    if first.row_tokens != second.row_tokens or not tokens.any():
        return second.student_nll - first.student_nll, None, None, None
    sums = np.asarray(second.row_nll, dtype=np.float64) - np.asarray(first.row_nll, dtype=np.float64)
    counted = tokens > 0
    tokens, sums = tokens[counted], sums[counted]
    (found,) = bootstrap(lambda weights: (weights @ sums / (weights @ tokens))[:, None], len(tokens))
    return found.value, found.low, found.high, found.p_value
