"""`linear_divergence` by chunks of tokens: gradients in closed form, written over the chunk's logits.

Only two buffers of chunk by vocabulary exist at a time, whatever the number of tokens. The pointwise part runs over
groups of rows small enough to stay in a processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xarch_kd.ops.divergence_inputs import DivergenceInputs
from xarch_kd.ops.divergence_rows import Distribution, Rows, distribution
from xarch_kd.ops.heads import HeadInputs
from xarch_kd.ops.streaming.logits import add_head_gradient, finish_logits, raw_logits_into, through_head
from xarch_kd.ops.streaming.row_gradients import compare
from xarch_kd.ops.streaming.top_k import rows_with_top_k
from xarch_kd.ops.teacher import Buckets, TeacherLogits

# Logits of one model in a chunk and in a group of rows. On a CPU a larger chunk saves passes over the heads and the
# head's gradient, until its logits are as large as that gradient; on a GPU it also fills the device.
CHUNK_ELEMENTS = {"cpu": 6 << 20, "other": 256 << 20}
FROZEN_HEAD_CHUNK_ELEMENTS = {"cpu": 4 << 20, "other": 128 << 20}
GROUP_ELEMENTS = {"cpu": 1 << 17, "other": 64 << 20}
# Tokens in a chunk are a multiple of it, the rows that a CPU's library multiplies together.
CHUNK_MULTIPLE = 16
# A row far from the teacher and without a gradient, of a divergence that saturates.
SATURATED_GRADIENT, SATURATED_VALUE = 1e-6, 0.1


@dataclass
class ForwardBackward:
    """Per-token values [k], and the gradients of student hidden, weight and bias that were wanted.

    `saturated` is the number of tokens that are far from the teacher and yet have no gradient, if it is counted.
    """

    divergence: Tensor
    cross_entropy: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    saturated: Tensor | None = None

    @property
    def gradient(self) -> bool:
        """True if any gradient is required."""
        return any(part is not None for part in (self.hidden, self.weight, self.bias))


def default_chunk(inputs: DivergenceInputs, head_trains: bool) -> int:
    """Return the number of tokens per chunk; chunks are about equal, and shorter without a gradient of the head."""
    device = "cpu" if inputs.weights.device.type == "cpu" else "other"
    elements = (CHUNK_ELEMENTS if head_trains else FROZEN_HEAD_CHUNK_ELEMENTS)[device]
    chunks = -(-inputs.tokens // max(1, elements // inputs.vocabulary))
    even = -(-inputs.tokens // max(1, chunks))
    return max(1, min(-(-even // CHUNK_MULTIPLE) * CHUNK_MULTIPLE, inputs.tokens))


@torch.no_grad()
def forward_backward(
    inputs: DivergenceInputs, scale: Tensor, wanted: tuple[bool, ...], chunk_size: int | None
) -> ForwardBackward:
    """Go over the valid tokens once. `scale` [k] multiplies each token's part in the gradients.

    `wanted`: the gradients of the student's hidden states, weight and bias are computed, or not.
    """
    result = _empty(inputs, wanted)
    chunk = min(chunk_size or default_chunk(inputs, wanted[1]), max(1, inputs.tokens))
    models = 2 if isinstance(inputs.teacher, HeadInputs) else 1
    buffers = scale.new_empty(models, chunk, inputs.vocabulary, dtype=inputs.logits_dtype)
    with torch.autocast(scale.device.type, enabled=False):
        for start in range(0, inputs.tokens, chunk):
            _chunk_pass(inputs, scale, result, slice(start, min(start + chunk, inputs.tokens)), buffers)
    return result


def _empty(inputs: DivergenceInputs, wanted: tuple[bool, ...]) -> ForwardBackward:
    student, tokens = inputs.student, inputs.weights
    of = (student.hidden, student.head.weight, student.head.bias)
    hidden, weight, bias = (
        tokens.new_empty(tensor.shape) if need and tensor is not None else None
        for tensor, need in zip(of, wanted, strict=True)
    )
    if hidden is not None and (inputs.valid_indices is not None or inputs.tokens == 0):
        hidden.zero_()
    if weight is not None:
        # The first chunk writes the rows that are compared.
        weight[inputs.vocabulary if inputs.tokens else 0 :] = 0
    if bias is not None:
        bias.zero_()
    cross_entropy = None if inputs.labels is None else torch.empty_like(tokens)
    is_counted = inputs.divergence.formula.saturates and inputs.divergence_weight > 0 and any(wanted)
    saturated = torch.zeros((), dtype=torch.long, device=tokens.device) if is_counted else None
    return ForwardBackward(torch.empty_like(tokens), cross_entropy, hidden, weight, bias, saturated)


def _chunk_pass(inputs: DivergenceInputs, scale: Tensor, result: ForwardBackward, at: slice, buffers: Tensor) -> None:
    """Fill the rows `at` of the result and add their part to the gradients."""
    size, head = at.stop - at.start, inputs.student.head
    rows = at if inputs.valid_indices is None else inputs.valid_indices[at]
    hidden = inputs.student.hidden[rows].to(buffers.dtype)
    student = raw_logits_into(buffers[0, :size], hidden, head.weight)
    teacher = buffers[-1, :size]
    if isinstance(inputs.teacher, HeadInputs):
        raw_logits_into(teacher, inputs.teacher.hidden[rows].to(buffers.dtype), inputs.teacher.head.weight)
    device = "cpu" if scale.device.type == "cpu" else "other"
    group = max(1, GROUP_ELEMENTS[device] // inputs.vocabulary)
    for start in range(0, size, group):
        inner = slice(start, min(start + group, size))
        outer = slice(at.start + inner.start, at.start + inner.stop)
        _group(inputs, scale[outer, None], result, outer, student[inner], teacher[inner])
    if result.bias is not None:
        result.bias[: inputs.vocabulary] += student.sum(0, dtype=result.bias.dtype)
    if result.weight is not None:
        add_head_gradient(result.weight[: inputs.vocabulary], student, hidden, first=at.start == 0)
    if result.hidden is not None:
        result.hidden[rows] = through_head(student, head.weight, result.hidden.dtype)


def _group(
    inputs: DivergenceInputs,
    scale: Tensor,
    result: ForwardBackward,
    at: slice,
    raw_student: Tensor,
    raw_teacher: Tensor,
) -> None:
    """Fill the rows `at` of the result and write the gradient of the raw student logits over them."""
    student = finish_logits(raw_student.to(inputs.dtype), inputs.student.head)
    soft = student if inputs.temperature == 1.0 else student / inputs.temperature
    q = None if isinstance(inputs.teacher, Buckets) else distribution(soft)
    result.divergence[at], slope = _divergence(inputs, result.gradient, at, soft, q, raw_teacher)
    if slope is not None and result.saturated is not None:
        result.saturated += _saturated(slope, result.divergence[at])
    factor = scale * (inputs.divergence_weight / inputs.temperature)
    if inputs.labels is not None and result.cross_entropy is not None:
        plain = q if q is not None and soft is student else distribution(student)
        labels = inputs.labels[at, None]
        cross_entropy = plain.top - student.gather(-1, labels) - plain.likeliest.log()
        result.cross_entropy[at] = cross_entropy.squeeze(-1)
        if slope is not None and inputs.cross_entropy_weight:
            share = scale * inputs.cross_entropy_weight
            slope.mul_(factor).addcmul_(plain.probabilities, share).scatter_add_(-1, labels, -share)
            factor = torch.ones_like(factor)
    if slope is None:
        return
    if inputs.student.head.softcap is not None:
        slope.mul_(student.div_(inputs.student.head.softcap).square_().neg_().add_(1))
    torch.mul(slope, factor * inputs.student.head.scale, out=raw_student)


def _divergence(
    inputs: DivergenceInputs, gradient: bool, at: slice, student: Tensor, q: Distribution | None, raw: Tensor
) -> Rows:
    """Return the values and slopes of the rows `at`; `student` are logits over the temperature, `q` softmax of them."""
    teacher = inputs.teacher
    if isinstance(teacher, Buckets):
        return rows_with_top_k(inputs.divergence, student, teacher.rows(at), gradient)
    if isinstance(teacher, TeacherLogits):
        rows = at if inputs.valid_indices is None else inputs.valid_indices[at]
        logits = teacher.values[rows, : inputs.vocabulary].to(inputs.dtype, copy=True)
    else:
        logits = finish_logits(raw.to(inputs.dtype), teacher.head)
    if inputs.temperature != 1.0:
        logits.div_(inputs.temperature)
    assert q is not None
    return compare(inputs.divergence, q, distribution(logits), gradient)


def _saturated(slope: Tensor, divergence: Tensor) -> Tensor:
    flat = (slope.amax(-1) < SATURATED_GRADIENT) & (slope.amin(-1) > -SATURATED_GRADIENT)
    return (flat & (divergence > SATURATED_VALUE)).sum()
