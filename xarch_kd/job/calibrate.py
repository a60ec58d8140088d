"""The calibration pass of a plan: run once, kept in the run folder, shown by `xarch-kd plan --calibrate`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xarch_kd.calibration.initialize import prepare, tokens_to_prepare
from xarch_kd.calibration.layer_similarity import measure_similarities
from xarch_kd.data.batches import Batch
from xarch_kd.data.rows import pack
from xarch_kd.errors import CheckpointError
from xarch_kd.files import write_tensors
from xarch_kd.job.models import RunModels, load_models, load_run_tokenizer
from xarch_kd.job.texts import training_and_held_out
from xarch_kd.planning.layer_maps import entry_key
from xarch_kd.planning.plan import Plan, StagePlan
from xarch_kd.planning.resolve import calibrated_plan
from xarch_kd.run.folder import RunFolder
from xarch_kd.taps.layout import layout_of
from xarch_kd.training.aligner import Aligner

Say = Callable[[str], None]


def calibrate(plan: Plan, say: Say) -> Plan:
    """Load both models and the text, measure how alike their layers are, and return the plan with what follows."""
    if not plan.uncalibrated:
        return plan
    tokenizer = load_run_tokenizer(plan)
    text, _ = training_and_held_out(plan)
    rows = pack(text, tokenizer, plan.mapping.data.sequence_length)
    return calibrated(plan, load_models(plan, tokenizer, say), rows, say)


def calibrated(plan: Plan, models: RunModels, rows: Tensor, say: Say, *, kept: Path | None = None) -> Plan:
    """Return the plan with the layer maps that follow from the similarity of the layers of `models` on `rows`.

    The similarity is read from `kept` when it is there, and written there otherwise. Raises CheckpointError for a file
    that is not this plan's, DataError for too little text.
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
    similarities = measure_similarities(plan, *layouts, rows)
    say(f"calibration on about {plan.mapping.calibration.tokens:,} tokens: {time.perf_counter() - began:.1f} s")
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(kept, similarities)
    return calibrated_plan(plan, similarities)


def _read(plan: Plan, path: Path) -> dict[str, Tensor]:
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}", found=str(error), fix="delete it: it is measured again") from error
    wanted = {entry_key(stage, name) for stage, name in plan.uncalibrated}
    if not wanted <= set(stored):
        raise CheckpointError(
            f"{path} does not hold what this plan needs", found=", ".join(stored), allowed=", ".join(sorted(wanted))
        )
    return stored


START_FILE = "start.safetensors"


def prepare_stage(plan: Plan, stage: StagePlan, aligner: Aligner, rows: Tensor, path: Path, say: Say) -> None:
    """Fit a stage's projectors and constants to rows of training text, or read from `path` what was fitted before.

    `rows` [rows, time] are token ids, of which at most `calibration.tokens` are read.
    """
    wanted = min(tokens_to_prepare(aligner), plan.mapping.calibration.tokens)
    if wanted == 0:
        return
    start = path / START_FILE
    if start.exists():
        aligner.load_trained_state(start, student=False)
        return
    began = time.perf_counter()
    chosen = calibration_rows(rows, wanted, seed=plan.mapping.seed)
    batches = (Batch(input_ids=part, origin="calibration text") for part in chosen.split(stage.batch_size))
    for notice in prepare(aligner, batches):
        say(f"stage {stage.stage.name}: {notice}")
    write_tensors(start, aligner.trained_state(student=False))
    say(f"stage {stage.stage.name}: fitted to {chosen.numel():,} tokens in {time.perf_counter() - began:.1f} s")


def calibration_rows(rows: Tensor, tokens: int, *, seed: int) -> Tensor:
    """Return rows of training text of about so many tokens, in the order that the seed gives."""
    order = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))
    return rows[order[: max(1, math.ceil(tokens / rows.shape[1]))]]


def tell_maps(stage: StagePlan, aligner: Aligner, folder: RunFolder, say: Say) -> None:
    """Show and record the layer maps that a stage learned, and warn of those that collapsed."""
    for name, layer_map in aligner.layer_maps(stage.stage.steps).items():
        warning = layer_map.collapsed()
        weights = [[round(weight, 4) for weight in row] for row in layer_map.weights.tolist()]
        folder.event("layer-map", stage=stage.stage.name, entry=name, weights=weights, warning=warning)
        say(layer_map.text_plot())
        if warning is not None:
            say(f"warning: stage {stage.stage.name}, {name}: {warning}")
