"""Checks across the objectives of a stage: an active objective at each step, a reference for balancing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from xarch_kd.errors import check_table
from xarch_kd.losses.schedules import SHAPES, WeightSchedule
from xarch_kd.mapping_file.layer_maps import LearnedStrategy
from xarch_kd.mapping_file.objectives import Align, Schedule
from xarch_kd.mapping_file.schema import Stage
from xarch_kd.mapping_file.source_map import Problem, YamlPath
from xarch_kd.planning.layer_maps import redraw_period
from xarch_kd.planning.plan import PairPlan

check_table("schedules", SHAPES, get_args(Schedule.model_fields["kind"].annotation))


def objective_problems(stage: Stage, pairs: Sequence[PairPlan], place: YamlPath) -> Iterator[Problem]:
    """Yield the problems of the objectives of a stage that train something."""
    present = {pair.align for pair in pairs}
    entries = [entry for entry in stage.align if entry.name in present]
    if stage.tokens is None and entries and all(entry.loss.weight == "auto" for entry in entries):
        position = stage.align.index(entries[0])
        message = (
            "every objective of this stage has weight: auto, so there is nothing to balance against. Give one of them "
            "a number, or add tokens."
        )
        yield Problem((*place, "align", position, "loss", "weight"), message)
    schedules = [weight_schedule(entry.schedule) for entry in entries]
    if stage.tokens is not None:
        schedules.append(weight_schedule(stage.tokens.schedule))
    # A stage of epochs is checked when its text was read.
    steps = stage.steps or 0
    for step in _turns(schedules, steps):
        if not any(schedule.factor(step / steps) > 0 for schedule in schedules):
            message = (
                f"no objective has a weight above 0 at step {step + 1} of {steps}. Let their schedules meet, or "
                "make two stages."
            )
            yield Problem(place, message)
            break
    changing = next(_changing(stage, entries), None)
    if changing is not None and stage.evaluation is not None and stage.evaluation.compares:
        message = (
            f"keep: best and patience compare held-out losses of different steps, but {changing}, so that they are not "
            "the same loss. Use metric: nll."
        )
        yield Problem((*place, "evaluation"), message, on="key")


def _changing(stage: Stage, entries: Sequence[Align]) -> Iterator[str]:
    """Yield what makes the held-out loss of a stage another function at another step."""
    if stage.evaluation is None or stage.evaluation.metric != "loss":
        return
    for entry in entries:
        if entry.schedule is not None:
            yield f"the weight of {entry.name} has a schedule"
        if redraw_period(entry) is not None:
            yield f"the layer map of {entry.name} is redrawn"
        if isinstance(entry.layers, LearnedStrategy) and entry.layers.final_temperature is not None:
            yield f"the temperature of the layer map of {entry.name} changes"
    if stage.tokens is not None and stage.tokens.schedule is not None:
        yield "the weight of tokens has a schedule"


def _turns(schedules: Sequence[WeightSchedule], steps: int) -> list[int]:
    """Return candidate steps: the first step at which every schedule is 0, if there is one, is among them.

    A factor becomes 0 at the first step or next to its start or end, so that step is one of these.
    """
    edges = {0.0, 1.0} | {edge for schedule in schedules for edge in (schedule.start, schedule.end)}
    near = {int(edge * steps) + offset for edge in edges for offset in (-1, 0, 1)}
    return sorted(step for step in near if 0 <= step < steps)


def batch_warnings(stage: Stage, pairs: Sequence[PairPlan], tokens: int) -> Iterator[str]:
    """Yield a warning for each entry whose loss needs more than `tokens` tokens per micro-batch."""
    entries = {entry.name: entry for entry in stage.align}
    for pair in pairs:
        loss, dim = entries[pair.align].loss, max(pair.student_dim, pair.teacher_dim)
        enough = loss.tokens_per_dim * dim
        if tokens < enough:
            yield (
                f"stage {stage.name}: {pair.align} compares {tokens} tokens at a time in "
                f"{dim} dimensions by {loss.label}, which is more noise than signal "
                f"below {enough}: raise batch_size or data.sequence_length"
            )


def redraw_warnings(stage: Stage) -> Iterator[str]:
    """Yield a warning for each map that is redrawn while the teacher's features are cached."""
    for entry in stage.align:
        if redraw_period(entry) is not None and stage.cache_place != "off":
            yield (
                f"stage {stage.name}: the map of {entry.name} is redrawn every {redraw_period(entry)} steps, so the "
                "cache may exceed this estimate, up to all layers of the teacher"
            )


def weight_schedule(options: Schedule | None) -> WeightSchedule:
    """Return the schedule of these options, a constant one for None."""
    return WeightSchedule() if options is None else WeightSchedule(**options.model_dump())
