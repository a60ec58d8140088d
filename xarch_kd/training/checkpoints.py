"""Checkpoints of one stage: the files of each, and which of them are complete."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from xarch_kd.errors import CheckpointError
from xarch_kd.files import write_tensors
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.loss_balancing import write_balance

STATE_FILE = "trained.safetensors"
# State of the batch source, beside it.
SOURCE_FILE = "source.json"
KEPT_CHECKPOINTS = 2
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


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a stage, oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in folder.glob("checkpoint-*")
        if (match := CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a stage, if there is one.

    Raises CheckpointError when it lacks a part (files were removed or only partly copied).
    """
    found = checkpoints(folder)
    if not found:
        return None
    for name in (STATE_FILE, SOURCE_FILE, "trainer_state.json", "optimizer.pt"):
        if not (found[-1] / name).is_file():
            raise CheckpointError(
                f"the checkpoint {found[-1]} lacks {name}", fix=f"delete {found[-1]} and resume from the one before"
            )
    return found[-1]
