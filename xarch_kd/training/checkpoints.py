"""Checkpoints of one stage: the files of each, and which of them are complete."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xarch_kd.errors import CheckpointError
from xarch_kd.files import cannot_write, damage_of, seal, write_tensors
from xarch_kd.planning.disk import KEPT_CHECKPOINTS
from xarch_kd.run.processes import Processes
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.loss_balancing import write_balance

STATE_FILE = "trained.safetensors"
# State of the batch source, beside it.
SOURCE_FILE = "source.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def read_source_state(path: Path) -> dict[str, Any]:
    """Return the state of a batch source from its file. Raises CheckpointError if it cannot be read."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}", found=str(error), fix="delete the checkpoint and run again with --resume"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} does not hold the state of a batch source", found=type(state).__name__)
    return state


def write_state(aligner: Aligner, path: Path) -> None:
    """Write the trained tensors of a stage, whole or not at all. Raises CheckpointError if they cannot be written."""
    if aligner.balance is not None:
        write_balance(aligner.balance, path)
    write_tensors(path, aligner.trained_state())


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that were done when a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a stage, oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in folder.glob("checkpoint-*")
        if (match := CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def staging_of(folder: Path) -> Path:
    """Return the folder in which a checkpoint of a stage is written."""
    return folder / "saving"


@contextmanager
def staged_checkpoint(folder: Path, step: int, processes: Processes) -> Iterator[Path | None]:
    """Yield the folder to write the checkpoint of a step into, on every rank; then rename it to its final name.

    Yields None if the checkpoint is there. Older ones are removed. Raises CheckpointError if it cannot be written.
    """
    final = folder / f"checkpoint-{step}"
    if processes.from_main(final.exists):
        yield None
        return
    staging = staging_of(folder)
    if processes.is_main:
        shutil.rmtree(staging, ignore_errors=True)
    try:
        processes.barrier()
        yield staging / final.name
        processes.barrier()
        if processes.is_main:
            seal(staging / final.name)
            os.replace(staging / final.name, final)
    except (OSError, RuntimeError) as error:
        # Formats of sharded parameters report a full disk as a RuntimeError of torch's writer.
        raise cannot_write(final, error) from error
    finally:
        if processes.is_main:
            shutil.rmtree(staging, ignore_errors=True)
    if processes.is_main:
        for old in checkpoints(folder)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)


@dataclass(frozen=True, kw_only=True)
class DamagedCheckpoint:
    """A checkpoint that cannot be used, and the first thing that is wrong with it."""

    path: Path
    reason: str


def newest_whole(folder: Path) -> tuple[Path | None, tuple[DamagedCheckpoint, ...]]:
    """Return the newest checkpoint of a stage whose files are all as they were written, and the damaged newer ones."""
    damaged: list[DamagedCheckpoint] = []
    for path in reversed(checkpoints(folder)):
        reason = damage_of(path)
        if reason is None:
            return path, tuple(damaged)
        damaged.append(DamagedCheckpoint(path=path, reason=reason))
    return None, tuple(damaged)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it is not used and its step can be written again; return the new path."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished stage, damaged ones included; its trained tensors stay."""
    for path in [*checkpoints(folder), *folder.glob("damaged-checkpoint-*")]:
        shutil.rmtree(path)
