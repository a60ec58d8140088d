"""Head of a student from the teacher's: student head = teacher head ∘ map of the head input.

The map [teacher dim, student dim] takes the student's final-normed hidden state to the teacher's. It is a ridge
regression on calibration text, or the projector that a stage trained on the tap `head_input`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from xarch_kd.calibration.initialize import FIRST_TOKENS
from xarch_kd.data.batches import Batch
from xarch_kd.errors import UsageError
from xarch_kd.planning.heads import head_obstacle
from xarch_kd.projectors import PairStatistics, ridge
from xarch_kd.projectors.base import Projector
from xarch_kd.projectors.closed_form import enough_tokens, explained_variance
from xarch_kd.taps.layout import Layout, run_base
from xarch_kd.training.aligner import Aligner

# Times as many tokens as a fit should have at least.
AMPLE = 4


@dataclass(frozen=True, kw_only=True)
class HeadMap:
    """Ridge map `weight` [teacher dim, student dim] of head inputs, and the share of the teacher's variance in it."""

    weight: Tensor
    tokens: int
    explained: float


def tokens_to_fit(student: Layout) -> int:
    """Return the number of tokens of calibration text that a map of the head input is fitted to."""
    return AMPLE * enough_tokens(student.dim)


@torch.no_grad()
def fit_head_map(teacher: Layout, student: Layout, batches: Iterable[Batch]) -> HeadMap:
    """Return the ridge regression of the teacher's head input on the student's, without the first tokens of each row.

    Both models are read in evaluation mode. Raises UsageError for fewer tokens than the student has dimensions.
    """
    modes = teacher.model.training, student.model.training
    teacher.model.eval()
    student.model.eval()
    statistics = PairStatistics()
    device = student.head_weight.device
    for batch in (part.to(device) for given in batches for one in given.apart() for part in one.unpadded()):
        skip = FIRST_TOKENS if batch.input_ids.shape[1] > 2 * FIRST_TOKENS else 0
        own, other = (
            run_base(layout, batch.input_ids, batch.model_mask, batch.position_ids)[:, skip:].float()
            for layout in (student, teacher)
        )
        statistics.update(own, other)
    teacher.model.train(modes[0])
    student.model.train(modes[1])
    if statistics.tokens <= student.dim:
        raise UsageError(
            "the head cannot be fitted to fewer tokens than the student has dimensions",
            found=f"{statistics.tokens} tokens, {student.dim} dimensions",
            allowed=f"at least {enough_tokens(student.dim)} tokens",
            fix="give more text or raise calibration.tokens, or head: fresh",
        )
    with warnings.catch_warnings():
        found = ridge(statistics, bias=False)
    explained = explained_variance(statistics, found.weight)
    return HeadMap(weight=found.weight.float().cpu(), tokens=statistics.tokens, explained=explained)


@torch.no_grad()
def set_head(teacher: Layout, student: Layout, weight: Tensor) -> None:
    """Set the student's head to that of the teacher applied to the mapped head input, so that logits are compared.

    `weight` is [teacher dim, student dim]. Raises UsageError for heads that cannot be composed (`head_obstacle`).
    """
    reason = head_obstacle(teacher, student)
    if reason is not None:
        raise UsageError("the student's head cannot be made from the teacher's", found=reason)
    head = teacher.head_weight
    factor = teacher.logit_scale / student.logit_scale
    # In float32, whatever dtype the teacher is kept in.
    composed = torch.cat([rows.float() @ weight.to(head.device, torch.float32) for rows in head.split(8192)])
    student.head_weight.copy_((factor * composed).to(student.head_weight))
    for own, other in ((student.head_bias, teacher.head_bias),):
        if own is not None:
            own.copy_(torch.zeros_like(own) if other is None else factor * other.to(own))


def fold_projector(aligner: Aligner) -> str:
    """Fold the projector of the stage's `head_input` entry into the student's head; return a line to print."""
    entry = next(entry for entry in aligner.entries if entry.align.tap == "head_input")
    pair = entry.objectives[0].pair
    projector = aligner.projectors[pair.projector_key]
    assert isinstance(projector, Projector)
    set_head(aligner.reader.layout, aligner.layout, projector.matrix() / pair.teacher_scale)
    return f"the student's head is the teacher's head after the projector of {entry.align.name}"
