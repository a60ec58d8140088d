"""Logits of a chunk of tokens in the accumulation dtype, whatever dtype the head is kept in."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.ops.divergence_problem import Side

# Rows of a head that are widened at a time: 2048 * 4096 float32 is 32 MiB.
BLOCK_ROWS = 2048


def blocks(rows: int, weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Return the row ranges in which a head is read: one when it already has `dtype`, else blocks to be widened."""
    step = rows if weight.dtype == dtype else BLOCK_ROWS
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def logits_into(out: Tensor, hidden: Tensor, side: Side) -> Tensor:
    """Write the logits [tokens, vocabulary] of `hidden` [tokens, width] into `out` and return it.

    `hidden` has the dtype of `out`; the vocabulary is the width of `out`.
    """
    vocabulary = out.shape[-1]
    for rows in blocks(vocabulary, side.weight, out.dtype):
        torch.mm(hidden, side.weight[rows].to(out.dtype).T, out=out[:, rows])
    if side.bias is not None:
        out.add_(side.bias[:vocabulary].to(out.dtype))
    if side.scale != 1.0:
        out.mul_(side.scale)
    if side.softcap is not None:
        out.div_(side.softcap).tanh_().mul_(side.softcap)
    return out
