"""Notices of a run whose micro-batches are split over processes."""

from __future__ import annotations

from collections.abc import Iterator

from xarch_kd.errors import UsageError
from xarch_kd.mapping_file.objectives import Align, MixingMatch
from xarch_kd.planning.layer_maps import is_learned
from xarch_kd.planning.plan import Plan


def split_notices(plan: Plan, world_size: int) -> Iterator[str]:
    """Yield a warning for each objective that is not the same when its rows are split over processes.

    Raises UsageError for a stage whose micro-batches have fewer rows than there are processes.
    """
    for stage in plan.stages:
        if stage.batch_size < world_size:
            raise UsageError(
                f"the micro-batches of stage '{stage.stage.name}' have fewer rows than there are processes",
                found=f"batch_size {stage.batch_size} for {world_size} processes",
                allowed="one row or more per process: the rows of each micro-batch are split over the processes",
                fix=f"set the stage's batch_size to {world_size} or more, or start fewer processes",
            )
        for align in stage.stage.align:
            reason = _not_a_sum(align)
            if reason is not None:
                yield (
                    f"stage {stage.stage.name}, {align.name}: {reason} is computed from each process's own rows and "
                    f"averaged, so {world_size} processes do not give the numbers of one"
                )


def _not_a_sum(align: Align) -> str | None:
    """Return what of an entry is no sum over tokens, None where everything is."""
    loss = align.loss
    if loss.kind == "cka":
        return "CKA"
    if is_learned(align):
        return "the objective of the learned layer map"
    if isinstance(loss, MixingMatch) and loss.heads == "learned":
        return "the objective of the learned head map"
    if isinstance(loss, MixingMatch) and loss.impl == "sketch":
        return "the sketch's random estimate"
    return None
