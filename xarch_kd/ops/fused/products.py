"""Matrix products between kernels: operands in their own dtype, results as wide as they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a head that are converted at a time, when its dtype is not that of the product.
BLOCK_ROWS = 8192


def product_into(out: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Write first second into `out`, which may be wider than the operands, and return it; sums are float32."""
    if first.dtype == out.dtype:
        return torch.mm(first, second, out=out)
    if out.is_cuda:
        return torch.ops.aten.mm.dtype_out(first, second, out.dtype, out=out)
    return torch.mm(first.to(out.dtype), second.to(out.dtype), out=out)


def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Add first second to `total`, which may be wider than the operands."""
    if first.dtype == total.dtype:
        total.addmm_(first, second)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, first, second, total.dtype, out=total)
    else:
        total.addmm_(first.to(total.dtype), second.to(total.dtype))


def through_weight(out: Tensor, gradient: Tensor, weight: Tensor) -> None:
    """Write gradient weight [tokens, dim] into `out`, converting the weight's rows block by block if need be."""
    if weight.dtype == gradient.dtype:
        product_into(out, gradient, weight)
        return
    out.zero_()
    for rows in _blocks(weight.shape[0]):
        add_product(out, gradient[:, rows], weight[rows].to(gradient.dtype))


def by_weight(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Write hidden weightᵀ [tokens, rows] into `out`, converting the weight's rows block by block if need be."""
    if weight.dtype == hidden.dtype:
        product_into(out, hidden, weight.T)
        return
    for rows in _blocks(weight.shape[0]):
        product_into(out[:, rows], hidden, weight[rows].to(hidden.dtype).T)


def _blocks(rows: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_ROWS, rows)) for start in range(0, rows, BLOCK_ROWS)]


def even_chunk(tokens: int, largest: int) -> int:
    """Return the size of the fewest chunks of at most `largest` tokens, about equally large."""
    count = -(-tokens // largest)
    return -(-tokens // max(count, 1)) or 1
