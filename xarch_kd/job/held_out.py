"""Held-out batches of the stages that are evaluated while they train."""

from __future__ import annotations

from collections.abc import Iterator

from xarch_kd.data.batches import Batch
from xarch_kd.data.rows import Rows, first_rows
from xarch_kd.job.texts import RunText
from xarch_kd.planning.plan import Plan, StagePlan


def held_out_rows(text: RunText, plan: Plan) -> Rows | None:
    """Return the held-out rows of a run, None if no stage is evaluated while it trains.

    Raises DataError if a stage is and no document is held out.
    """
    return text.held_out() if any(stage.stage.evaluation is not None for stage in plan.stages) else None


def held_out_batches(stage: StagePlan, rows: Rows | None) -> Iterator[Batch]:
    """Yield the held-out micro-batches of a stage: full ones, or a single smaller one if the text is short."""
    if rows is None or stage.stage.evaluation is None:
        return
    chosen = first_rows(rows, stage.stage.evaluation.batches * stage.batch_size)
    full = len(chosen) // stage.batch_size
    for number, batch in enumerate(chosen.batches(stage.batch_size, origin="held-out text")):
        if number < max(full, 1):
            yield batch
