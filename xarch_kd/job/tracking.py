"""Writers of other tools for the figures of a stage: TensorBoard event files and Weights & Biases runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from xarch_kd.errors import UsageError

# Project of W&B unless WANDB_PROJECT names another.
PROJECT: Final = "xarch-kd"


@contextmanager
def tracked(tracking: Sequence[str], run: Path, stage: str, *, is_owner: bool) -> Iterator[None]:
    """Run the block, one stage, within a W&B run of its own if the mapping file requests one.

    Its files are in `wandb/` of the run folder; `WANDB_MODE`, `WANDB_PROJECT` and the other variables of W&B apply. A
    W&B run that was begun before is used and left to its owner. TensorBoard files are written by the trainer alone.

    Raises UsageError if W&B cannot begin a run.
    """
    if "wandb" not in tracking or not is_owner:
        yield
        return
    import wandb

    if wandb.run is not None:
        yield
        return
    try:
        wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=f"{run.name}-{stage}",
            group=run.name,
            dir=str(run),
            # The console is the reporter's.
            settings=wandb.Settings(console="off", silent=True),
        )
    except Exception as error:  # W&B raises its own classes, and those of its service and of the network
        raise UsageError(
            "W&B cannot begin a run",
            asked="tracking: [wandb]",
            found=str(error) or type(error).__name__,
            fix="wandb login, or set WANDB_MODE=offline, then run again with --resume",
        ) from error
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        wandb.finish(exit_code=exit_code)
