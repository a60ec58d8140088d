"""Disk space of a run: tensors of its checkpoints, cached features and saved students.

A checkpoint holds what trains and the two moments of AdamW, all in float32, and a copy each of the average of the
weights and of the best evaluated ones. While one is written, the two before it are still there. A finished stage keeps
what it trained, and a finished run also the student and the projectors.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xarch_kd.errors import UsageError

if TYPE_CHECKING:
    from xarch_kd.mapping_file.schema import Student
    from xarch_kd.planning.plan import Plan, StagePlan

KEPT_CHECKPOINTS: Final = 2
# A trained number, and the moments of it in the optimizer's state.
TRAINED_BYTES: Final = 4
CHECKPOINT_BYTES: Final = 12
STORED_BYTES: Final = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class DiskUse:
    """Bytes in the run folder: at most while it trains, and when it is finished."""

    peak: int
    kept: int


def disk_use(stages: Sequence[StagePlan], student: Student, parameters: int) -> DiskUse:
    """Return the forecast for stages whose student, of `parameters` numbers, is saved at the end."""
    kept, peak = 0, 0
    for stage in stages:
        trained = stage.trainable_parameters + stage.projector_parameters
        cache = stage.cache_bytes if stage.stage.cache_place == "disk" else 0
        copies = (stage.stage.ema is not None) + (stage.stage.evaluation is not None)
        checkpoint = (CHECKPOINT_BYTES + copies * TRAINED_BYTES) * trained
        peak = max(peak, kept + (KEPT_CHECKPOINTS + 1) * checkpoint + cache)
        kept += TRAINED_BYTES * trained
    kept += TRAINED_BYTES * sum(stage.projector_parameters for stage in stages)
    kept += parameters * STORED_BYTES[student.dtype] * (2 if student.format == "mamba_ssm" else 1)
    return DiskUse(peak=max(peak, kept), kept=kept)


def check_disk(plan: Plan, folder: Path) -> int:
    """Return the free bytes of the disk of a run folder. Raises UsageError if the run does not fit there."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    needed = plan.disk.peak - present
    if needed > free:
        cached = [stage.stage.name for stage in plan.stages if stage.stage.cache_place == "disk"]
        other = f", or set cache: memory or off in {', '.join(cached)}" if cached else ""
        raise UsageError(
            "the disk is too full for this run",
            asked=folder,
            found=f"{free / 2**30:.2f} GiB free",
            allowed=f"at least {needed / 2**30:.2f} GiB, for {KEPT_CHECKPOINTS} checkpoints and one that is written, "
            "trained tensors of finished stages, and cached features",
            fix=f"free some space, or give an --output on another disk{other}",
        )
    return free
