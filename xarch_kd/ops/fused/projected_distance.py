"""`projected_distance` with a Triton kernel for the rows: products by the matrix library, one program a token."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.ops.dispatch import kernel_obstacle
from xarch_kd.ops.distance_problem import DistanceProblem
from xarch_kd.ops.fused.products import add_product, by_weight, through_weight
from xarch_kd.ops.streaming.projected_distance import Sweep


def obstacle(problem: DistanceProblem) -> str | None:
    """Return why the kernel cannot run on this problem, or None when it can."""
    return kernel_obstacle(problem.student, problem.teacher, problem.weight, problem.bias)


@torch.no_grad()
def sweep(problem: DistanceProblem, scale: Tensor | None, wanted: tuple[bool, ...], chunk: int) -> Sweep:
    """Go over the counted tokens once. `scale`, a scalar or [k], multiplies each token's part in the gradients."""
    of = (problem.student, problem.weight, problem.bias)
    gradients = [
        torch.zeros(tensor.shape, dtype=problem.dtype, device=tensor.device) if need and tensor is not None else None
        for tensor, need in zip(of, wanted, strict=True)
    ]
    values = problem.teacher.new_empty(problem.tokens, dtype=problem.dtype)
    result = Sweep(values, *gradients)
    row_scale = None if scale is None else scale.to(problem.dtype).expand(problem.tokens).contiguous()
    with torch.autocast(values.device.type, enabled=False):
        for start in range(0, problem.tokens, chunk):
            _sweep_chunk(problem, row_scale, result, slice(start, min(start + chunk, problem.tokens)))
    return result


def _sweep_chunk(problem: DistanceProblem, scale: Tensor | None, result: Sweep, at: slice) -> None:
    """Fill the rows `at` of the result and add their part to the gradients."""
    from xarch_kd.kernels import projected_distance as kernels

    rows = at if problem.kept is None else problem.kept[at]
    student, teacher, weight = problem.student[rows], problem.teacher[rows], problem.weight
    dtype = _gradient_dtype(problem)
    if weight is None:
        projected = student.to(problem.dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        student = student.to(_operand_dtype(student, weight, problem))
        projected = result.values.new_empty(student.shape[0], weight.shape[0])
        by_weight(projected, student, weight)
    result.values[at] = kernels.distance_rows(
        projected,
        teacher if teacher.stride(-1) == 1 else teacher.contiguous(),
        None if problem.bias is None else problem.bias.contiguous(),
        None if scale is None else scale[at],
        problem.distance,
        problem.epsilon,
        dtype,
        problem.delta,
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


def _operand_dtype(student: Tensor, weight: Tensor, problem: DistanceProblem) -> torch.dtype:
    """Return what features and projector are multiplied in: as they are, where they agree."""
    return weight.dtype if student.dtype == weight.dtype else problem.dtype


def _gradient_dtype(problem: DistanceProblem) -> torch.dtype:
    """Return the dtype of the gradient of the projected student: bfloat16 where it is multiplied by nothing wider.

    float16 is no choice: how small or large this gradient is depends on features and width.
    """
    weight = problem.weight
    narrow = weight is not None and problem.student.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if narrow else problem.dtype
