"""`linear_divergence` with a Triton kernel for the rows: products by the matrix library, one program per row of logits.

Two buffers of chunk by vocabulary exist at a time. The kernel overwrites the student's logits with their gradient,
which has the dtype of the student's head, so that every product is one of operands of that dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.ops.dispatch import kernel_unsupported_reason
from xarch_kd.ops.divergence_inputs import DivergenceInputs
from xarch_kd.ops.fused.products import add_product, by_weight, even_chunk, through_weight
from xarch_kd.ops.heads import Head, HeadInputs
from xarch_kd.ops.streaming.linear_divergence import SATURATED_GRADIENT, SATURATED_VALUE, ForwardBackward
from xarch_kd.ops.teacher import Buckets, TeacherLogits

# Reading and writing the float32 gradient of the head takes as long as a product of a quarter of this many tokens, and
# the two buffers are as large as that gradient where a head is as wide.
CHUNK_TOKENS = 2048
# float16 has little room below a mean's gradient: rows are scaled so that the largest scale of all is this.
FLOAT16_SCALE = 64.0


def unsupported_reason(inputs: DivergenceInputs) -> str | None:
    """Return why the kernel cannot run on these inputs, or None when it can."""
    student, teacher = inputs.student, inputs.teacher
    if inputs.divergence.formula.kernel is None:
        return f"there is no kernel for the divergence '{inputs.divergence.name}'"
    if isinstance(teacher, Buckets):
        return "there is no kernel for a teacher given as its likeliest entries"
    given = [student.hidden, student.head.weight, student.head.bias]
    if isinstance(teacher, TeacherLogits):
        given.append(teacher.values)
    else:
        given += [teacher.hidden, teacher.head.weight, teacher.head.bias]
    return kernel_unsupported_reason(*given, inputs.weights)


@torch.no_grad()
def forward_backward(
    inputs: DivergenceInputs, scale: Tensor, wanted: tuple[bool, ...], chunk_size: int | None
) -> ForwardBackward:
    """Go over the valid tokens once. `scale` [k] multiplies each token's part in the gradients.

    `wanted`: the gradients of the student's hidden states, weight and bias are computed, or not.
    """
    from xarch_kd.kernels import linear_divergence as kernels

    dtype = _operand_dtype(inputs.student, inputs)
    lift = _lift(scale, dtype, inputs)
    result = _empty(inputs, wanted, dtype)
    chunk = min(chunk_size or even_chunk(inputs.tokens, CHUNK_TOKENS), max(inputs.tokens, 1))
    padded = -(-inputs.vocabulary // kernels.ALIGNMENT) * kernels.ALIGNMENT
    models = 2 if isinstance(inputs.teacher, HeadInputs) else 1
    buffers = scale.new_empty(models, chunk, padded, dtype=inputs.logits_dtype)
    with torch.autocast(scale.device.type, enabled=False):
        for start in range(0, inputs.tokens, chunk):
            at = slice(start, min(start + chunk, inputs.tokens))
            _chunk_pass(inputs, scale if lift is None else scale * lift, result, at, buffers, dtype)
    if lift is not None:
        for part in (result.hidden, result.weight, result.bias):
            if part is not None:
                part.div_(lift)
    return result


def _operand_dtype(model: HeadInputs, inputs: DivergenceInputs) -> torch.dtype:
    """Return what a model's hidden states and head are multiplied in: as they are, where they agree."""
    if inputs.logits_dtype != inputs.dtype:
        return inputs.logits_dtype
    weight = model.head.weight
    return weight.dtype if model.hidden.dtype == weight.dtype else inputs.dtype


def _lift(scale: Tensor, dtype: torch.dtype, inputs: DivergenceInputs) -> Tensor | None:
    """Return what the rows' scales are multiplied by while gradients are float16, and None for other dtypes."""
    if dtype != torch.float16 or scale.numel() == 0:
        return None
    bound = inputs.divergence_weight / inputs.temperature + inputs.cross_entropy_weight
    peak = scale.abs().max() * (bound * abs(inputs.student.head.scale))
    return FLOAT16_SCALE / peak.clamp_min(torch.finfo(torch.float32).tiny * FLOAT16_SCALE)


def _empty(inputs: DivergenceInputs, wanted: tuple[bool, ...], dtype: torch.dtype) -> ForwardBackward:
    student, tokens = inputs.student, inputs.weights
    need_hidden, need_weight, need_bias = wanted
    # bfloat16 has the range of float32, and the product that gives this gradient is rounded once.
    direct = dtype == torch.bfloat16 == student.hidden.dtype == student.head.weight.dtype
    hidden = tokens.new_zeros(student.hidden.shape, dtype=dtype if direct else None) if need_hidden else None
    weight = tokens.new_zeros(student.head.weight.shape) if need_weight else None
    bias = tokens.new_zeros(student.head.weight.shape[0]) if need_bias else None
    cross_entropy = None if inputs.labels is None else torch.empty_like(tokens)
    is_counted = inputs.divergence.formula.saturates and inputs.divergence_weight > 0 and any(wanted)
    saturated = torch.zeros((), dtype=torch.long, device=tokens.device) if is_counted else None
    return ForwardBackward(torch.empty_like(tokens), cross_entropy, hidden, weight, bias, saturated)


def _chunk_pass(
    inputs: DivergenceInputs, scale: Tensor, result: ForwardBackward, at: slice, buffers: Tensor, dtype: torch.dtype
) -> None:
    """Fill the rows `at` of the result and add their part to the gradients."""
    from xarch_kd.kernels import linear_divergence as kernels

    student, vocabulary, size = inputs.student, inputs.vocabulary, at.stop - at.start
    rows = at if inputs.valid_indices is None else inputs.valid_indices[at]
    hidden = student.hidden[rows].to(dtype)
    by_weight(buffers[0, :size, :vocabulary], hidden, student.head.weight[:vocabulary])
    teacher = _teacher(inputs, rows, buffers[-1, :size])
    _rows(inputs, scale, result, at, buffers[0, :size], teacher, dtype if result.gradient else None)
    if not result.gradient:
        return
    gradient = kernels.gradient_view(buffers[0, :size], dtype)[:, :vocabulary]
    if result.bias is not None:
        result.bias[:vocabulary] += gradient.sum(0, dtype=result.bias.dtype)
    if result.weight is not None:
        add_product(result.weight[:vocabulary], gradient.T, hidden)
    if result.hidden is not None and isinstance(rows, slice):
        through_weight(result.hidden[rows], gradient, student.head.weight[:vocabulary])
    elif result.hidden is not None:
        picked = result.hidden.new_empty(size, student.hidden.shape[-1])
        through_weight(picked, gradient, student.head.weight[:vocabulary])
        result.hidden[rows] = picked


def _teacher(inputs: DivergenceInputs, rows: slice | Tensor, buffer: Tensor) -> Tensor:
    """Return the teacher's products or logits [rows, at least the vocabulary], in `buffer` if they are products."""
    teacher = inputs.teacher
    assert not isinstance(teacher, Buckets)
    if isinstance(teacher, TeacherLogits):
        values = teacher.values[rows]
        return values if values.stride(-1) == 1 else values.contiguous()
    hidden = teacher.hidden[rows].to(_operand_dtype(teacher, inputs))
    by_weight(buffer[:, : inputs.vocabulary], hidden, teacher.head.weight[: inputs.vocabulary])
    return buffer


def _rows(
    inputs: DivergenceInputs,
    scale: Tensor,
    result: ForwardBackward,
    at: slice,
    student_rows: Tensor,
    teacher_rows: Tensor,
    gradient: torch.dtype | None,
) -> None:
    """Run the kernel over rows of products or logits [rows, at least the vocabulary]."""
    from xarch_kd.kernels import linear_divergence as kernels

    student, divergence = inputs.student.head, inputs.divergence
    teacher = inputs.teacher.head if isinstance(inputs.teacher, HeadInputs) else None
    share, kernel = divergence.parameter or 0.0, divergence.formula.kernel
    assert kernel is not None
    values, cross_entropy, steepest = kernels.divergence_rows(
        student_rows,
        teacher_rows,
        scale[at],
        None if inputs.labels is None else inputs.labels[at],
        _bias(student, inputs.vocabulary),
        None if teacher is None else _bias(teacher, inputs.vocabulary),
        inputs.vocabulary,
        kernel,
        share,
        1 / (share * (1 - share)) if divergence.normalised else 1.0,
        inputs.temperature,
        inputs.divergence_weight,
        inputs.cross_entropy_weight,
        student.scale,
        1.0 if teacher is None else teacher.scale,
        student.softcap or 0.0,
        (teacher.softcap or 0.0) if teacher is not None else 0.0,
        gradient,
    )
    result.divergence[at] = values
    if result.cross_entropy is not None:
        result.cross_entropy[at] = cross_entropy
    if result.saturated is not None and gradient is not None:
        result.saturated += ((steepest < SATURATED_GRADIENT) & (values > SATURATED_VALUE)).sum()


def _bias(head: Head, vocabulary: int) -> Tensor | None:
    return None if head.bias is None else head.bias[:vocabulary].contiguous()
