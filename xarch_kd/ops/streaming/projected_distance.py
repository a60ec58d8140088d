"""`projected_distance` by chunks of tokens: the projected tensor exists for one chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xarch_kd.ops.projected_inputs import ProjectedDistanceInputs

CHUNK_ELEMENTS = {"cpu": 1 << 20, "other": 32 << 20}


@dataclass
class ForwardBackward:
    """Per-token distance [k], and the gradients of student, weight and bias that were wanted."""

    values: Tensor
    student: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def default_chunk(inputs: ProjectedDistanceInputs) -> int:
    """Return how many tokens are projected at a time."""
    device = "cpu" if inputs.teacher.device.type == "cpu" else "other"
    return max(1, CHUNK_ELEMENTS[device] // inputs.teacher.shape[-1])


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
    with torch.autocast(values.device.type, enabled=False):
        for start in range(0, inputs.tokens, chunk):
            at = slice(start, min(start + chunk, inputs.tokens))
            _chunk(inputs, scale[at, None] if scale is not None and scale.dim() else scale, result, at)
    return result


def _chunk(inputs: ProjectedDistanceInputs, scale: Tensor | None, result: ForwardBackward, at: slice) -> None:
    rows = at if inputs.valid_indices is None else inputs.valid_indices[at]
    student, teacher = inputs.student[rows].to(inputs.dtype), inputs.teacher[rows].to(inputs.dtype)
    weight = None if inputs.weight is None else inputs.weight.to(inputs.dtype)
    projected = student if weight is None else student @ weight.T
    if inputs.bias is not None:
        projected = projected.add_(inputs.bias.to(inputs.dtype))
    if scale is None and inputs.formula.rows is None:
        result.values[at] = inputs.formula.token_values(projected, teacher, **inputs.arguments)
        return
    result.values[at], slope = inputs.formula.rows_with_gradient(projected, teacher, **inputs.arguments)
    if scale is None:
        return
    slope.mul_(scale)
    if result.bias is not None:
        result.bias += slope.sum(0)
    if result.weight is not None:
        result.weight.addmm_(slope.T, student)
    if result.student is not None:
        result.student[rows] = slope if weight is None else slope @ weight
