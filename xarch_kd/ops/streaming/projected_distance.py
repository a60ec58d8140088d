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
    """Go over the counted tokens once. `scale`, a scalar or [k], multiplies each token's part in the gradients."""
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
    rows = at if inputs.kept is None else inputs.kept[at]
    student, teacher = inputs.student[rows].to(inputs.dtype), inputs.teacher[rows].to(inputs.dtype)
    weight = None if inputs.weight is None else inputs.weight.to(inputs.dtype)
    projected = student if weight is None else student @ weight.T
    if inputs.bias is not None:
        projected = projected.add_(inputs.bias.to(inputs.dtype))
    result.values[at], slope = _rows(inputs, projected, teacher)
    if scale is None:
        return
    slope.mul_(scale)
    if result.bias is not None:
        result.bias += slope.sum(0)
    if result.weight is not None:
        result.weight.addmm_(slope.T, student)
    if result.student is not None:
        result.student[rows] = slope if weight is None else slope @ weight


def _rows(inputs: ProjectedDistanceInputs, projected: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance [rows] and its gradient [rows, width] with respect to the projected student."""
    if inputs.distance == "cosine":
        length = (projected.square().sum(-1, keepdim=True) + inputs.epsilon).sqrt()
        teacher_length = (teacher.square().sum(-1, keepdim=True) + inputs.epsilon).sqrt()
        cosine = (projected * teacher).sum(-1, keepdim=True) / (length * teacher_length)
        slope = projected * (cosine / length.square())
        return 1 - cosine.squeeze(-1), slope.sub_(teacher / (length * teacher_length))
    difference = projected - teacher
    if inputs.distance == "huber":
        slope = difference.clamp(-inputs.delta, inputs.delta)
        # x² / 2 up to delta and a line beyond: clamp(x) (x - clamp(x) / 2).
        return difference.sub_(slope / 2).mul_(slope).mean(-1), slope.div_(teacher.shape[-1])
    if inputs.distance == "l2":
        # By the norm of the difference, whose squares might overflow or vanish.
        length = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
        root = teacher.shape[-1] ** 0.5
        return length.squeeze(-1) / root, difference.mul_(torch.where(length > 0, 1 / (length * root), 0.0))
    values = difference.square().sum(-1)
    if inputs.distance == "normalised_mse":
        norm = teacher.square().sum(-1) + inputs.epsilon
        return values / norm, difference.mul_(2 / norm[:, None])
    if inputs.distance == "mse":
        return values / teacher.shape[-1], difference.mul_(2 / teacher.shape[-1])
    return values, difference.mul_(2)
