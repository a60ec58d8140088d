"""The calibration pass of a plan: run once, kept in the run folder, shown by `xarch-kd plan --calibrate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xarch_kd.data.rows import pack
from xarch_kd.errors import CheckpointError
from xarch_kd.job.models import Models, load_models, load_run_tokenizer
from xarch_kd.job.texts import training_and_held_out
from xarch_kd.mapping_file.layer_maps import entry_key
from xarch_kd.mapping_file.plan import Plan
from xarch_kd.mapping_file.resolve import calibrated_plan
from xarch_kd.taps.layout import layout_of
from xarch_kd.training.calibration import measure_similarities
from xarch_kd.training.run_folder import write_tensors

Say = Callable[[str], None]


def calibrate(plan: Plan, say: Say) -> Plan:
    """Load both models and the text, measure how alike their layers are, and return the plan with what follows."""
    if not plan.uncalibrated:
        return plan
    tokenizer = load_run_tokenizer(plan)
    text, _ = training_and_held_out(plan)
    rows = pack(text, tokenizer, plan.mapping.data.sequence_length)
    return calibrated(plan, load_models(plan, tokenizer, say), rows, say)


def calibrated(plan: Plan, models: Models, rows: Tensor, say: Say, *, kept: Path | None = None) -> Plan:
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
