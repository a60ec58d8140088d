"""Report on a stage's projectors: does the student fit the teacher, or the projector?

Measured before and after the stage on the same calibration text: a projector alone is fitted to one half of it, and
that projector and the trained one are measured on the other half. Both results are kept in the stage's folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from xarch_kd.calibration.initialize import observations
from xarch_kd.data.batches import Batch
from xarch_kd.data.rows import Rows, Selection, select_rows
from xarch_kd.errors import CheckpointError
from xarch_kd.files import write_text
from xarch_kd.planning.plan import Plan
from xarch_kd.projectors import PairStatistics, Projector, enough_tokens, resolve_init
from xarch_kd.projectors.closed_form import FORMS
from xarch_kd.projectors.diagnostics import Diagnosis, diagnose, explained_alone
from xarch_kd.run.report import Reporter, Work
from xarch_kd.training.aligner import Aligner

MOST_TOKENS: Final = 16_384
BATCH_TOKENS: Final = 2048
ALONE_FILE: Final = "projectors-alone.json"
REPORT_FILE: Final = "projectors.json"


@dataclass(frozen=True, kw_only=True)
class ProjectorReport:
    """Figures of one projector after training, measured on `tokens` tokens; `note` names what limits them.

    `pairs` are the names of the pairs that share it.
    """

    stage: str
    projector: str
    pairs: tuple[str, ...]
    tokens: int
    diagnosis: Diagnosis
    note: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON, where a condition number of infinity is null."""
        own = {name: getattr(self, name) for name in ("stage", "projector", "pairs", "tokens")}
        found = {**own, **dataclasses.asdict(self.diagnosis), "share": self.diagnosis.share, "note": self.note}
        return found | {"condition": None if math.isinf(self.diagnosis.condition) else self.diagnosis.condition}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> ProjectorReport:
        """Return the report that `as_dict` came from."""
        values = {
            **stored,
            "pairs": tuple(stored["pairs"]),
            "warnings": tuple(stored["warnings"]),
            "condition": math.inf if stored["condition"] is None else stored["condition"],
        }
        diagnosis = Diagnosis(**{entry.name: values[entry.name] for entry in dataclasses.fields(Diagnosis)})
        own = {name: values[name] for name in ("stage", "projector", "pairs", "tokens", "note")}
        return cls(**own, diagnosis=diagnosis)

    @property
    def lines(self) -> tuple[str, ...]:
        """One line with the figures, and one for the note and for each warning."""
        note = () if self.note is None else (f"  {self.note}",)
        return (self._line, *note, *(f"  warning: {warning}" for warning in self.diagnosis.warnings))

    @property
    def _line(self) -> str:
        found = self.diagnosis
        alone = "" if found.alone is None else f"; a projector alone {found.alone:.0%}"
        return (
            f"projector {self.projector} ({found.kind}, rank {found.rank} of {found.possible_rank}, condition "
            f"{found.condition:.3g}): explains {found.explained:.0%} of the teacher, at most {found.ceiling:.0%}{alone}"
        )


class ProjectorCheck:
    """Measurement of the projectors of one stage, before and after it; nothing is run where there are none.

    Both results are kept in `folder`, the stage's, so that a resumed run neither loses them nor measures a trained
    student as if it were an initial one. `rows` are training text.
    """

    def __init__(self, plan: Plan, aligner: Aligner, rows: Rows, folder: Path, reporter: Reporter) -> None:
        self.aligner, self.folder, self.reporter = aligner, folder, reporter
        self.fitted, self.held_out = halves(rows, min(plan.mapping.calibration.tokens, MOST_TOKENS), plan.mapping.seed)

    @property
    def needed(self) -> bool:
        """True if the stage has a trainable projector."""
        return any(_learns(module) for module in self.aligner.projectors.values())

    def before(self) -> None:
        """Measure the fit of a projector alone to the untrained student, if this was not done before.

        Called after `prepare`, which is fitted to other text.
        """
        path = self.folder / ALONE_FILE
        if self.needed and not path.exists():
            with self._work(self.fitted.tokens + self.held_out.tokens) as work:
                found = alone(self.aligner, self.fitted, self.held_out, work)
            write_text(path, _json(found))

    def after(self) -> tuple[ProjectorReport, ...]:
        """Return the reports of the trained projectors, measured now if they were not before."""
        if not self.needed:
            return ()
        path = self.folder / REPORT_FILE
        if not path.exists():
            before = self.folder / ALONE_FILE
            known = _read(before) if before.exists() else {}
            with self._work(self.held_out.tokens) as work:
                found = reports(self.aligner, self.held_out, known, work)
            write_reports(path, found)
        return read_reports(path)

    def _work(self, tokens: int) -> Work:
        return self.reporter.work(f"stage {self.aligner.stage.stage.name}: measuring projectors", tokens, "tokens")


def halves(rows: Rows, tokens: int, seed: int) -> tuple[Selection, Selection]:
    """Return two disjoint halves of about `tokens` tokens of `rows`; the first is empty for one row.

    They are the last in the order of which calibration takes the first, so that with enough text no closed form was
    fitted to them.
    """
    count = max(2, tokens * len(rows) // rows.tokens)
    chosen = select_rows(rows, count, seed=seed, from_end=True).chosen
    return Selection(rows=rows, chosen=chosen[1::2]), Selection(rows=rows, chosen=chosen[::2])


def alone(
    aligner: Aligner, fitted: Selection, held_out: Selection, work: Work | None = None
) -> dict[str, dict[str, Any]]:
    """Return by projector the variance `explained` by one of its kind alone, None where it cannot be, and a `note`.

    It is fitted in closed form to the rows `fitted` and measured on `held_out`.
    """
    before = _statistics(aligner, fitted, work)
    found: dict[str, dict[str, Any]] = {}
    for key, seen in _statistics(aligner, held_out, work).items():
        explained, note = None, "one row of calibration text is too little to measure a projector alone"
        if key in before:
            note = _too_few(seen.projector, before[key].own.tokens)
            form = FORMS[resolve_init("auto", seen.projector.kind)]
            if before[key].own.tokens > form.dimensions(seen.projector):
                explained = explained_alone(seen.projector, before[key].own, seen.own)
        found[key] = {"explained": explained, "note": note}
    return found


def reports(
    aligner: Aligner, held_out: Selection, known: dict[str, dict[str, Any]], work: Work | None = None
) -> tuple[ProjectorReport, ...]:
    """Return the reports of trained projectors, measured on the rows `held_out`; `known` is from `alone`."""
    missing = {"explained": None, "note": "a projector alone was not measured before the stage began"}
    made = []
    for key, seen in _statistics(aligner, held_out, work).items():
        before = known.get(key, missing)
        statistics = at_best_scale(seen.projector, seen.last) if seen.scale_free else seen.last
        made.append(
            ProjectorReport(
                stage=aligner.stage.stage.name,
                projector=key,
                pairs=tuple(seen.pairs),
                tokens=statistics.tokens,
                diagnosis=diagnose(seen.projector, statistics, alone=before["explained"]),
                note=before["note"],
            )
        )
    return tuple(made)


@torch.no_grad()
def at_best_scale(projector: Projector, statistics: PairStatistics) -> PairStatistics:
    """Return the statistics with the teacher at the size that the projector's output fits best.

    For losses that see directions alone, which leave the size of what a projector gives to chance.
    """
    parameter = next(projector.parameters())
    _, weight, bias = projector.split(parameter.new_zeros(1, projector.student_dim))
    assert weight is not None
    moments, weight = statistics.moments(centered=False), weight.double()
    product = (weight * moments.cross.T).sum()
    teacher_sq_norm = (weight @ moments.student * weight).sum()
    if bias is not None:
        means = statistics.moments()
        product = product + bias.double() @ means.teacher_mean
        teacher_sq_norm = (
            teacher_sq_norm + 2 * bias.double() @ (weight @ means.student_mean) + bias.double().square().sum()
        )
    if not bool((product > 0) & (teacher_sq_norm > 0)):
        return statistics
    scale = teacher_sq_norm / product
    powers = {"cross": 1, "teacher": 2, "teacher_mean": 1}
    state = statistics.state()
    return PairStatistics.from_state({name: value * scale ** powers.get(name, 0) for name, value in state.items()})


def write_reports(path: Path, found: Sequence[ProjectorReport]) -> None:
    """Write reports as JSON. Raises CheckpointError if it can't."""
    write_text(path, _json({"projectors": [report.as_dict() for report in found]}))


def read_reports(path: Path) -> tuple[ProjectorReport, ...]:
    """Return the reports of a file of `write_reports`. Raises CheckpointError for another file."""
    try:
        return tuple(ProjectorReport.from_dict(stored) for stored in _read(path)["projectors"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold reports of projectors", found=repr(error)) from error


def warnings_of(found: Iterable[ProjectorReport]) -> list[str]:
    """Return every warning, with the stage and the projector it is of."""
    return [
        f"stage {report.stage}, projector {report.projector}: {warning}"
        for report in found
        for warning in report.diagnosis.warnings
    ]


@dataclass(kw_only=True)
class _Seen:
    """Statistics of a projector: of the student's `own` features, and of the `last` that its weight is applied to."""

    projector: Projector
    scale_free: bool
    own: PairStatistics
    last: PairStatistics
    pairs: dict[str, None]


@torch.no_grad()
def _statistics(aligner: Aligner, rows: Selection, work: Work | None) -> dict[str, _Seen]:
    """Return the statistics of each projector that learns, by key, over some rows."""
    found: dict[str, _Seen] = {}
    size = max(1, BATCH_TOKENS // rows.rows.sequence_length)
    batches: Iterable[Batch] = rows.batches(size, origin="calibration text")
    if work is not None:
        batches = work.track(batches, lambda batch: batch.tokens)
    for objective, projection, skip in observations(aligner, batches):
        if projection is None or not _learns(projection.projector):
            continue
        seen = found.setdefault(
            projection.key,
            _Seen(
                projector=projection.projector,
                scale_free=objective.entry.loss.is_scale_free,
                own=PairStatistics(),
                last=PairStatistics(),
                pairs={},
            ),
        )
        seen.pairs[objective.pair.name] = None
        student, teacher = projection.student[:, skip:].float(), projection.teacher[:, skip:]
        seen.own.update(student, teacher)
        features = projection.projector.split(student).features
        if features is not student:
            seen.last.update(features, teacher)
    for seen in found.values():
        if seen.last.tokens == 0:
            seen.last = seen.own
    return found


def _learns(module: object) -> bool:
    return isinstance(module, Projector) and any(True for _ in module.parameters())


def _too_few(projector: Projector, tokens: int) -> str | None:
    form = resolve_init("auto", projector.kind)
    dimensions = FORMS[form].dimensions(projector)
    if tokens <= dimensions:
        return (
            f"a projector alone was not measured: {form} in {dimensions} dimensions is fitted to more tokens than the "
            f"{tokens} of calibration text, {enough_tokens(dimensions)} are recommended"
        )
    if tokens < enough_tokens(dimensions):
        return f"what a projector alone reaches is a lower bound: {form} in {dimensions} dimensions of {tokens} tokens"
    return None


def _json(value: object) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}", found=str(error)) from error
