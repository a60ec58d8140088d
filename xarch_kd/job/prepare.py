"""What comes before and after the steps of a stage: what is fitted to calibration text, and what maps were learned."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from xarch_kd.mapping_file.plan import Plan, StagePlan
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.preparation import prepare, tokens_to_prepare
from xarch_kd.training.run_folder import RunFolder, write_tensors

START_FILE = "start.safetensors"
Say = Callable[[str], None]


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
    for notice in prepare(aligner, chosen.split(stage.batch_size)):
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
        say(layer_map.picture())
        if warning is not None:
            say(f"warning: stage {stage.stage.name}, {name}: {warning}")
