"""`projected_distance` with a Triton kernel for the rows: products by the matrix library, one program per token."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.ops.dispatch import kernel_unsupported_reason
from xarch_kd.ops.fused.products import add_product, by_weight, through_weight
from xarch_kd.ops.projected_inputs import ProjectedDistanceInputs
from xarch_kd.ops.streaming.projected_distance import ForwardBackward


def unsupported_reason(inputs: ProjectedDistanceInputs) -> str | None:
    """Return why the kernel cannot run on these inputs, or None when it can."""
    if inputs.formula.kernel is None:
        return f"there is no kernel for the distance '{inputs.formula.name}'"
    return kernel_unsupported_reason(inputs.student, inputs.teacher, inputs.weight, inputs.bias)


@torch.no_grad()
def forward_backward(
    inputs: ProjectedDistanceInputs, scale: Tensor | None, wanted: tuple[bool, ...], chunk: int
) -> ForwardBackward:
    """Go over the valid tokens once. `scale`, a scalar or [k], multiplies each token's part in the gradients."""
    of = (inputs.student, inputs.weight, inputs.bias)
    gradients = [
        torch.zeros(tensor.shape, dtype=inputs.dtype, device=tensor.device) if need and tensor is not None else None
        for tensor, need in zip(of, wanted, strict=True)
    ]
    values = inputs.teacher.new_empty(inputs.tokens, dtype=inputs.dtype)
    result = ForwardBackward(values, *gradients)
    row_scale = None if scale is None else scale.to(inputs.dtype).expand(inputs.tokens).contiguous()
    with torch.autocast(values.device.type, enabled=False):
        for start in range(0, inputs.tokens, chunk):
            _chunk_pass(inputs, row_scale, result, slice(start, min(start + chunk, inputs.tokens)))
    return result


def _chunk_pass(inputs: ProjectedDistanceInputs, scale: Tensor | None, result: ForwardBackward, at: slice) -> None:
    """Fill the rows `at` of the result and add their part to the gradients."""
    from xarch_kd.kernels import projected_distance as kernels

    rows = at if inputs.valid_indices is None else inputs.valid_indices[at]
    student, teacher, weight = inputs.student[rows], inputs.teacher[rows], inputs.weight
    dtype = _gradient_dtype(inputs)
    if weight is None:
        projected = student.to(inputs.dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        student = student.to(_operand_dtype(student, weight, inputs))
        projected = result.values.new_empty(student.shape[0], weight.shape[0])
        by_weight(projected, student, weight)
    result.values[at] = kernels.distance_rows(
        projected,
        teacher if teacher.stride(-1) == 1 else teacher.contiguous(),
        None if inputs.bias is None else inputs.bias.contiguous(),
        None if scale is None else scale[at],
        inputs.formula.kernel or "",
        inputs.epsilon,
        dtype,
        inputs.delta,
    )
    if scale is None:
        return
    gradient = kernels.gradient_view(projected, dtype)
    if result.bias is not None:
        result.bias += gradient.sum(0, dtype=result.bias.dtype)
    if result.weight is not None:
        add_product(result.weight, gradient.T, student.to(dtype))
    if result.student is None:
        return
    if weight is None:
        result.student[rows] = gradient
        return
    picked = result.student.new_empty(student.shape)
    through_weight(picked, gradient, weight)
    result.student[rows] = picked


def _operand_dtype(student: Tensor, weight: Tensor, inputs: ProjectedDistanceInputs) -> torch.dtype:
    """Return what features and projector are multiplied in: as they are, where they agree."""
    return weight.dtype if student.dtype == weight.dtype else inputs.dtype


def _gradient_dtype(inputs: ProjectedDistanceInputs) -> torch.dtype:
    """Return the dtype of the gradient of the projected student: bfloat16 where it is multiplied by nothing wider.

    float16 is no choice: how small or large this gradient is depends on features and width.
    """
    weight = inputs.weight
    narrow = weight is not None and inputs.student.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if narrow else inputs.dtype
