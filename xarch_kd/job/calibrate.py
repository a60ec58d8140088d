"""Calibration of a plan and of each stage, run once and kept in the run folder."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor

from xarch_kd.calibration.head import fit_head_map, set_head, tokens_to_fit
from xarch_kd.calibration.initialize import prepare, tokens_to_prepare
from xarch_kd.calibration.layer_similarity import measure_similarities
from xarch_kd.data.rows import Rows, rows_of_tokens, select_rows
from xarch_kd.errors import CheckpointError
from xarch_kd.files import read_tensors, write_tensors
from xarch_kd.job.layer_choice import select_layers
from xarch_kd.job.models import RunModels, load_models, load_run_tokenizer
from xarch_kd.job.texts import run_text
from xarch_kd.planning.layer_maps import entry_key
from xarch_kd.planning.plan import Plan, StagePlan
from xarch_kd.planning.resolve import calibrated_plan
from xarch_kd.run.folder import RunFolder
from xarch_kd.run.report import Reporter
from xarch_kd.taps.layout import layout_of
from xarch_kd.training.aligner import Aligner

START_FILE = "start.safetensors"


def calibrate(plan: Plan, reporter: Reporter) -> Plan:
    """Load models and text, and return the plan with the layers and the layer maps that follow from measurements."""
    if not plan.uncalibrated and not plan.is_unselected:
        return plan
    tokenizer = load_run_tokenizer(plan)
    text = run_text(plan, tokenizer, reporter)
    chosen = select_layers(plan, tokenizer, text, reporter)
    plan, teacher = chosen.plan, chosen.teacher
    if not plan.uncalibrated:
        return plan
    return calibrated(plan, load_models(plan, tokenizer, reporter, teacher=teacher), text.training, reporter)


def calibrated(plan: Plan, models: RunModels, rows: Rows, reporter: Reporter, *, kept: Path | None = None) -> Plan:
    """Return the plan with the layer maps computed from the similarity of the layers of `models` on `rows`.

    The similarity is read from the file `kept` if it exists, and is written there otherwise. Raises CheckpointError for
    a file of another plan, DataError for too little text.
    """
    if not plan.uncalibrated:
        return plan
    if kept is not None and kept.exists():
        return calibrated_plan(plan, _read(plan, kept))
    began = time.perf_counter()
    layouts = (
        layout_of(models.teacher, plan.mapping.teacher.paths),
        layout_of(models.student, plan.mapping.student.paths),
    )
    similarities = measure_similarities(plan, *layouts, rows, reporter=reporter)
    reporter.line(
        f"calibration on about {plan.mapping.calibration.tokens:,} tokens: {time.perf_counter() - began:.1f} s"
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(kept, similarities)
    return calibrated_plan(plan, similarities)


def _read(plan: Plan, path: Path) -> dict[str, Tensor]:
    try:
        stored, _ = read_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(
            error.message,
            asked=path,
            found=error.found,
            fix="delete it and run again with --resume: it is measured again",
        ) from error
    wanted = {entry_key(stage, name) for stage, name in plan.uncalibrated}
    if not wanted <= set(stored):
        raise CheckpointError(
            f"{path} does not hold what this plan needs", found=", ".join(stored), allowed=", ".join(sorted(wanted))
        )
    return stored


def prepare_stage(plan: Plan, stage: StagePlan, aligner: Aligner, rows: Rows, path: Path, reporter: Reporter) -> None:
    """Fit a stage's projectors and statistics to rows of training text, or read from `path` those fitted before.

    `rows` are training text, of which at most `calibration.tokens` tokens are read.
    """
    wanted = min(tokens_to_prepare(aligner), plan.mapping.calibration.tokens)
    if wanted == 0:
        return
    start = path / START_FILE
    if start.exists():
        try:
            aligner.load_trained_state(start, student=False)
        except CheckpointError as error:
            raise CheckpointError(
                error.message,
                asked=start,
                found=error.found,
                fix="delete it and run again with --resume: it is fitted again",
            ) from error
        return
    began = time.perf_counter()
    chosen = select_rows(rows, rows_of_tokens(rows, wanted), seed=plan.mapping.seed)
    with reporter.work(f"stage {stage.stage.name}: calibrating", chosen.tokens, "tokens") as work:
        batches = chosen.batches(stage.batch_size, origin="calibration text")
        notices = prepare(aligner, work.track(batches, lambda batch: batch.tokens))
    for notice in notices:
        reporter.line(f"stage {stage.stage.name}: {notice}")
    write_tensors(start, aligner.trained_state(student=False))
    reporter.line(
        f"stage {stage.stage.name}: fitted to {chosen.tokens:,} tokens in {time.perf_counter() - began:.1f} s"
    )


def start_head(plan: Plan, models: RunModels, rows: Rows, reporter: Reporter, *, kept: Path) -> None:
    """Make the head of a fresh student with `head: closed_form` from the teacher's, through a map fitted to `rows`.

    The map is read from the file `kept` if it exists, and is written there otherwise.
    """
    if plan.mapping.student.head != "closed_form":
        return
    teacher = layout_of(models.teacher, plan.mapping.teacher.paths)
    student = layout_of(models.student, plan.mapping.student.paths)
    if kept.exists():
        stored, _ = read_tensors(kept)
        set_head(teacher, student, stored["map"])
        return
    wanted = min(tokens_to_fit(student), plan.mapping.calibration.tokens)
    chosen = select_rows(rows, rows_of_tokens(rows, wanted), seed=plan.mapping.seed)
    with reporter.work("fitting the head", chosen.tokens, "tokens") as work:
        batches = chosen.batches(plan.mapping.data.batch_size, origin="calibration text")
        found = fit_head_map(teacher, student, work.track(batches, lambda batch: batch.tokens))
    write_tensors(kept, {"map": found.weight})
    set_head(teacher, student, found.weight)
    reporter.line(
        f"the student's head starts as the teacher's after a map of its head input, fitted to {found.tokens:,} tokens, "
        f"which explains {found.explained:.1%} of the variance"
    )


def report_maps(stage: StagePlan, aligner: Aligner, folder: RunFolder, reporter: Reporter, *, step: int) -> None:
    """Print and record the layer maps that a stage learned until `step`, and warn of those that collapsed."""
    for name, layer_map in aligner.layer_maps(step).items():
        warning = layer_map.collapsed()
        weights = [[round(weight, 4) for weight in row] for row in layer_map.weights.tolist()]
        folder.event("layer-map", stage=stage.stage.name, entry=name, weights=weights, warning=warning)
        reporter.line(layer_map.text_plot())
        if warning is not None:
            reporter.line(f"warning: stage {stage.stage.name}, {name}: {warning}")
