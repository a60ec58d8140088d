"""Resuming of a run: where it starts, the newest whole checkpoint of a stage, and stages that are finished."""

from __future__ import annotations

from pathlib import Path

from xarch_kd.errors import CheckpointError
from xarch_kd.planning.plan import Plan, StagePlan
from xarch_kd.run.folder import RunFolder
from xarch_kd.run.processes import Processes
from xarch_kd.run.report import Reporter
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.checkpoints import (
    STATE_FILE,
    checkpoints,
    newest_whole,
    remove_checkpoints,
    set_aside,
    step_of,
)


def resume_point(plan: Plan, folder: RunFolder) -> str:
    """Return in words where `--resume` starts: after the newest checkpoint of the first unfinished stage."""
    for stage in plan.stages:
        path = folder.stage(stage.folder)
        if (path / STATE_FILE).exists():
            continue
        saved = checkpoints(path)
        if not saved:
            return f"the run resumes at step 1 of stage '{stage.stage.name}', of which no step is saved"
        steps = "" if stage.is_open else f" of {stage.steps}"
        return f"the run resumes after step {step_of(saved[-1])}{steps} of stage '{stage.stage.name}'"
    return "all stages are trained; the run resumes by saving and evaluating the student"


def restore_stage(aligner: Aligner, done: Path, processes: Processes) -> None:
    """Load the trained tensors of a finished stage, and remove checkpoints that an interruption left.

    Raises CheckpointError if they are damaged.
    """
    try:
        aligner.load_trained_state(done)
    except CheckpointError as error:
        raise CheckpointError(
            error.message,
            asked=done,
            found=error.found,
            fix=f"restore it from a copy, or delete {done.parent} and the folders of later stages, which are then "
            "trained again with --resume",
        ) from error
    if processes.is_main:
        remove_checkpoints(done.parent)


def usable_checkpoint(
    stage: StagePlan, path: Path, folder: RunFolder, reporter: Reporter, processes: Processes
) -> Path | None:
    """Return the newest whole checkpoint of a stage, whose folder is `path`; damaged ones are named and set aside.

    Raises CheckpointError if there are checkpoints and none is whole.
    """
    newest, damaged = processes.from_main(lambda: newest_whole(path))
    if damaged and newest is None:
        raise CheckpointError(
            f"no checkpoint of stage '{stage.stage.name}' is whole",
            asked=path,
            found=", ".join(f"{one.path.name}: {one.reason}" for one in damaged),
            fix=f"restore a copy of it, or delete {path} to train this stage again from its start with --resume",
        )
    for one in damaged:
        folder.event("damaged-checkpoint", stage=stage.stage.name, checkpoint=one.path.name, reason=one.reason)
        reporter.line(f"warning: {one.path}: {one.reason}; resuming from {newest.name if newest else ''} instead")
        if processes.is_main:
            set_aside(one.path)
    return newest
