"""`linear_divergence` by chunks of tokens: gradients in closed form, written over the chunk's logits.

Only two buffers of chunk by vocabulary exist at a time, whatever the number of tokens. The pointwise part runs over
groups of rows small enough to stay in a processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xarch_kd.ops.divergence_problem import DivergenceProblem
from xarch_kd.ops.streaming.logits import add_head_gradient, finish_logits, raw_logits_into, through_head
from xarch_kd.ops.streaming.row_gradients import rows_with_gradient

# Logits of one model in a chunk and in a group of rows. On a CPU a larger chunk only saves passes over the head's
# gradient; on a GPU it also fills the device.
CHUNK_ELEMENTS = {"cpu": 6 << 20, "other": 256 << 20}
GROUP_ELEMENTS = {"cpu": 1 << 19, "other": 64 << 20}
FROZEN_HEAD_SHARE = 2


@dataclass
class Sweep:
    """Per-token values [k], and the gradients of student hidden, weight and bias that were wanted."""

    divergence: Tensor
    cross_entropy: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def default_chunk(problem: DivergenceProblem, head_trains: bool) -> int:
    """Return how many tokens a chunk has: fewer when no gradient of the head is added up, where more gain nothing."""
    device = "cpu" if problem.weights.device.type == "cpu" else "other"
    elements = CHUNK_ELEMENTS[device] if head_trains else CHUNK_ELEMENTS[device] // FROZEN_HEAD_SHARE
    return max(1, min(elements // problem.vocabulary, problem.tokens))


@torch.no_grad()
def sweep(problem: DivergenceProblem, scale: Tensor, wanted: tuple[bool, ...], chunk_size: int | None) -> Sweep:
    """Go over the counted tokens once. `scale` [k] multiplies each token's part in the gradients.

    `wanted` says whether the gradients of the student's hidden states, weight and bias are computed.
    """
    result = _empty(problem, wanted)
    chunk = min(chunk_size or default_chunk(problem, wanted[1]), max(problem.tokens, 1))
    buffers = scale.new_empty(2, chunk, problem.vocabulary, dtype=problem.logits_dtype)
    with torch.autocast(scale.device.type, enabled=False):
        for start in range(0, problem.tokens, chunk):
            _sweep_chunk(problem, scale, result, slice(start, min(start + chunk, problem.tokens)), buffers)
    return result


def _empty(problem: DivergenceProblem, wanted: tuple[bool, ...]) -> Sweep:
    student, tokens = problem.student, problem.weights
    of = (student.hidden, student.weight, student.bias)
    gradients = [
        tokens.new_zeros(tensor.shape) if need and tensor is not None else None
        for tensor, need in zip(of, wanted, strict=True)
    ]
    cross_entropy = None if problem.labels is None else torch.empty_like(tokens)
    return Sweep(torch.empty_like(tokens), cross_entropy, *gradients)


def _sweep_chunk(problem: DivergenceProblem, scale: Tensor, result: Sweep, at: slice, buffers: Tensor) -> None:
    """Fill the rows `at` of the result and add their part to the gradients."""
    size = at.stop - at.start
    rows = at if problem.kept is None else problem.kept[at]
    student_hidden = problem.student.hidden[rows].to(buffers.dtype)
    student = raw_logits_into(buffers[0, :size], student_hidden, problem.student.weight)
    teacher = raw_logits_into(buffers[1, :size], problem.teacher.hidden[rows].to(buffers.dtype), problem.teacher.weight)
    gradient = any(part is not None for part in (result.hidden, result.weight, result.bias))
    device = "cpu" if scale.device.type == "cpu" else "other"
    group = max(1, GROUP_ELEMENTS[device] // problem.vocabulary)
    for start in range(0, size, group):
        inner = slice(start, min(start + group, size))
        outer = slice(at.start + inner.start, at.start + inner.stop)
        _group(problem, scale[outer], result, outer, student[inner], teacher[inner], gradient)
    if result.bias is not None:
        result.bias[: problem.vocabulary] += student.sum(0, dtype=result.bias.dtype)
    if result.weight is not None:
        add_head_gradient(result.weight[: problem.vocabulary], student, student_hidden)
    if result.hidden is not None:
        result.hidden[rows] = through_head(student, problem.student.weight, result.hidden.dtype)


def _group(
    problem: DivergenceProblem,
    scale: Tensor,
    result: Sweep,
    at: slice,
    raw_student: Tensor,
    raw_teacher: Tensor,
    gradient: bool,
) -> None:
    """Fill the rows `at` of the result and write the gradient of the raw student logits over them."""
    softened = problem.temperature != 1.0
    student = finish_logits(raw_student.to(problem.dtype), problem.student)
    teacher = finish_logits(raw_teacher.to(problem.dtype), problem.teacher)
    log_q = torch.log_softmax(student / problem.temperature if softened else student, -1)
    log_p = torch.log_softmax(teacher.div_(problem.temperature) if softened else teacher, -1)
    divergence, slope = rows_with_gradient(problem.divergence, log_p, log_q, gradient)
    result.divergence[at] = divergence
    if slope is not None:
        slope.mul_(scale[:, None] * (problem.divergence_weight / problem.temperature))
    if problem.labels is not None and result.cross_entropy is not None:
        labels = problem.labels[at, None]
        plain = torch.log_softmax(student, -1) if softened else log_q
        result.cross_entropy[at] = -plain.gather(-1, labels).squeeze(-1)
        if slope is not None and problem.cross_entropy_weight:
            row = scale[:, None] * problem.cross_entropy_weight
            slope.add_(plain.exp_().mul_(row)).scatter_add_(-1, labels, -row)
    if slope is None:
        return
    if problem.student.softcap is not None:
        slope.mul_(student.div_(problem.student.softcap).square_().neg_().add_(1))
    raw_student.copy_(slope.mul_(problem.student.scale))
