"""Objectives between all pairs of tokens, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.ops import checks
from xarch_kd.ops.streaming.autograd import attach_gradients, wanted

BLOCK_ELEMENTS: Final = {"cpu": 1 << 20, "other": 32 << 20}


def block_rows(batch: int, heads: int, columns: int, device: torch.device) -> int:
    """Return the number of rows per block, over all sequences and heads, for this number of columns."""
    budget = BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "other"]
    return max(1, budget // max(1, batch * heads * columns))


def sum_of_blocks(student: Tensor, time: int, rows: int, part: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Return Σ part(student, rows) over blocks of `rows` of `time` rows, a scalar that allows one backward.

    The graph of one block is alive at a time: its gradient is taken at once and added up.
    """
    (needed,) = wanted(student)
    leaf = student.detach().requires_grad_(needed)
    total = student.new_zeros(())
    gradient = torch.zeros_like(leaf) if needed else None
    for start in range(0, time, rows):
        with torch.set_grad_enabled(needed), torch.autocast(student.device.type, enabled=False):
            value = part(leaf, slice(start, min(start + rows, time)))
        total += value.detach()
        if gradient is not None:
            gradient += torch.autograd.grad(value, leaf)[0]
    return attach_gradients(total, (student,), [gradient]) if gradient is not None else total


def paired(student: Tensor, teacher: Tensor, mask: Tensor | None, axes: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return student and teacher in the dtype of accumulation, 0 at invalid tokens, and the valid mask [batch, time].

    The teacher has no gradient. `axes` names those of both. Rows of products of invalid tokens are then alike
    in student and teacher, and add nothing to a distance of rows. Raises UsageError when the tensors do not fit.
    """
    checks.check_floating(student=student, teacher=teacher)
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor.dim() != len(axes.split(", ")):
            raise UsageError(f"{name} does not fit.", found=list(tensor.shape), allowed=f"[{axes}]")
    leading = tuple(student.shape[:2])
    checks.check_shape("teacher", teacher, (*leading, *teacher.shape[2:]), "[batch and time of student, …]")
    checks.check_shape("mask", mask, leading, "[batch, time]")
    checks.check_mask(mask)
    checks.check_device(student=student, teacher=teacher, mask=mask)
    dtype = checks.accumulation_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if mask is None:
        return student, teacher, torch.ones(leading, dtype=torch.bool, device=student.device)
    outside = ~mask.view(*leading, *(1,) * (student.dim() - 2))
    return student.masked_fill(outside, 0), teacher.masked_fill(outside, 0), mask


def finite(total: Tensor, name: str) -> Tensor:
    """Return the value of the objective `name`, or raise NonFiniteLoss."""
    checks.require(
        checks.all_finite(total),
        lambda: NonFiniteLoss(
            f"The objective '{name}' is not finite.",
            found="a NaN or infinite feature, or one too large",
            allowed="finite features at every token that counts",
        ),
    )
    return total
