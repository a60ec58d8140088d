"""Checks of heads that are made from the teacher's: `student.head: closed_form`, `head: from_projector` of a stage."""

from __future__ import annotations

from collections.abc import Iterator

from xarch_kd.mapping_file.schema import MappingFile, Stage
from xarch_kd.mapping_file.source_map import Problem
from xarch_kd.planning.models import ModelPair
from xarch_kd.planning.plan import StagePlan
from xarch_kd.taps.layout import Layout


def head_obstacle(teacher: Layout, student: Layout) -> str | None:
    """Return the reason for which a student's head cannot be the teacher's after a linear map; None if it can."""
    own, other = student.head_weight, teacher.head_weight
    if student.model.get_input_embeddings().weight is own:
        return "the student's head is its embedding. Set tie_word_embeddings: false"
    if own.shape[0] != other.shape[0]:
        return f"the student's vocabulary has {own.shape[0]} rows and the teacher's {other.shape[0]}"
    if teacher.logit_softcap != student.logit_softcap:
        caps = (teacher.logit_softcap, student.logit_softcap)
        return f"logits are capped at {caps[0]} by the teacher and at {caps[1]} by the student"
    if teacher.head_bias is not None and student.head_bias is None:
        return "the teacher's head has a bias and the student's has none"
    return None


def head_problems(mapping: MappingFile, models: ModelPair) -> Iterator[Problem]:
    """Yield the problem of `student.head: closed_form` with these models, if there is one."""
    if mapping.student.head == "closed_form":
        reason = head_obstacle(models.teacher.layout, models.student.layout)
        if reason is not None:
            yield Problem(("student", "head"), f"closed_form composes the teacher's head with a map, but {reason}.")


def projector_head_problems(stage: StagePlan, models: ModelPair) -> Iterator[Problem]:
    """Yield the problem of a stage whose projector cannot become the student's head, if there is one."""
    if stage.stage.head != "from_projector":
        return
    place = ("stages", stage.index, "head")
    reason = head_obstacle(models.teacher.layout, models.student.layout) or _projector_obstacle(stage.stage, stage)
    if reason is not None:
        yield Problem(place, f"from_projector folds the projector of the tap head_input into the head, but {reason}.")


def _projector_obstacle(stage: Stage, plan: StagePlan) -> str | None:
    pairs = [pair for pair in plan.pairs if pair.tap == "head_input"]
    if len(pairs) != 1:
        return f"the stage has {len(pairs) or 'no'} entries of that tap that train. Give it one"
    entry = plan.align_of(pairs[0])
    if pairs[0].projector not in ("linear", "low_rank", "orthogonal"):
        return f"the projector of {entry.name} is {pairs[0].projector}. Use projector: linear"
    if getattr(entry.projector_part, "bias", False):
        return f"the projector of {entry.name} has a bias, for which the head has no place. Leave out bias"
    if entry.loss.is_standardized:
        return f"the loss of {entry.name} compares standardized features. Leave out standardize"
    return None
