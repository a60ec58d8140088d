"""Point from which an unfinished run resumes, as its folder is now."""

from __future__ import annotations

from xarch_kd.planning.plan import Plan
from xarch_kd.run.folder import RunFolder
from xarch_kd.training.checkpoints import STATE_FILE, checkpoints


def resume_point(plan: Plan, folder: RunFolder) -> str:
    """Return in words where `--resume` starts: after the newest checkpoint of the first unfinished stage."""
    for stage in plan.stages:
        path = folder.stage(stage.folder)
        if (path / STATE_FILE).exists():
            continue
        saved = checkpoints(path)
        if not saved:
            return f"the run resumes at step 1 of stage '{stage.stage.name}', of which no step is saved"
        step = int(saved[-1].name.split("-")[1])
        return f"the run resumes after step {step} of {stage.stage.steps} of stage '{stage.stage.name}'"
    return "all stages are trained; the run resumes by saving and evaluating the student"
