"""Products of decays between tokens: exact at any strength, in float32 too.

A decay over tokens j < k <= i is exp(c_i − c_j), c the running sum of log decays. The running sum is kept in float64
and the difference is taken there: in float32 a long sum loses the small differences. Exponents that are used are never
above 0, so nothing overflows; those of pairs that are not used are masked before the exponential.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# exp(−1000) is 0 in float64 too; the bound keeps −∞, a decay to 0, out of differences.
FLOOR: Final = -1000.0
# Rows and columns of a tile whose exponents are taken pair by pair.
TILE: Final = 16


def running_sum(log_decay: Tensor, axis: int) -> Tensor:
    """Return the float64 running sum of log decays along `axis`."""
    return log_decay.double().clamp(min=FLOOR).cumsum(axis)


def grouped_product(left: Tensor, right: Tensor, heads: int) -> Tensor:
    """Return left·rightᵀ [batch, heads, rows, columns].

    left [batch, left groups, rows, width] and right [batch, right groups, columns, width]: head h has group
    h // (heads / groups) of each. The product is made once a group where left and right have the same.
    """
    groups = max(left.shape[1], right.shape[1])
    product = spread(left, groups) @ spread(right, groups).transpose(-1, -2)
    return spread(product, heads)


def spread(tensor: Tensor, heads: int) -> Tensor:
    """Return tensor [batch, groups, ...] with each group repeated for its heads: [batch, heads, ...]."""
    groups = tensor.shape[1]
    if groups == heads:
        return tensor
    # A view where there is one group.
    return tensor.unsqueeze(2).expand(-1, -1, heads // groups, *[-1] * (tensor.dim() - 2)).flatten(1, 2)


def causal_pairs(rows: slice, columns: slice, device: torch.device) -> Tensor:
    """Return which pairs have column <= row, bool [rows, columns]."""
    row = torch.arange(rows.start, rows.stop, device=device)
    column = torch.arange(columns.start, columns.stop, device=device)
    return column <= row[:, None]


def same_pairs(rows: slice, columns: slice, device: torch.device) -> Tensor:
    """Return which pairs are of one token, bool [rows, columns]."""
    row = torch.arange(rows.start, rows.stop, device=device)
    return torch.arange(columns.start, columns.stop, device=device) == row[:, None]


def decayed_pairs(left: Tensor, right: Tensor, left_sums: Tensor, right_sums: Tensor, causal: Tensor) -> Tensor:
    """Return Σ_n left_in right_jn exp(c_in − c_jn) [batch, heads, ..., rows, columns] of a tile; 0 where not causal.

    left and right [batch, groups, ..., tokens, n] (see `grouped_product`), sums in float64 [batch, heads, ..., tokens,
    n or 1]: with one sum for all n there is one exponent a pair, else one a pair and n.
    """
    heads = left_sums.shape[1]
    if left_sums.shape[-1] == 1:
        exponent = (left_sums - right_sums.transpose(-1, -2)).to(left.dtype)
        return grouped_product(left, right, heads) * exponent.masked_fill(~causal, float("-inf")).exp()
    exponent = (left_sums.unsqueeze(-2) - right_sums.unsqueeze(-3)).to(left.dtype)
    decay = exponent.masked_fill(~causal.unsqueeze(-1), float("-inf")).exp()
    groups = max(left.shape[1], right.shape[1])
    products = spread(left, groups).unsqueeze(-2) * spread(right, groups).unsqueeze(-3)
    return (spread(products, heads) * decay).sum(-1)


def decayed_entries(
    left: Tensor, right: Tensor, left_sums: Tensor, right_sums: Tensor, rows: slice, columns: slice
) -> Tensor:
    """Return Σ_n left_in right_jn exp(c_in − c_jn) for j <= i, else 0, without a [rows, columns, n].

    The result is [batch, heads, rows, columns]; left and left_sums [batch, heads, rows, n], right and right_sums
    [batch, heads, columns, n] hold the tokens of the slices, the sums in float64. Where all columns lie before the
    rows, both sides decay to the first row: two exponents of at most 0 and one product. Other blocks are split until
    that holds or they are tiles small enough for all exponents.
    """
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if not height or not width or columns.start >= rows.stop:
        return left.new_zeros(*left.shape[:-2], height, width)
    if columns.stop <= rows.start + 1:
        reference = left_sums[..., :1, :]
        near = left * (left_sums - reference).to(left.dtype).exp()
        return near @ (right * (reference - right_sums).to(left.dtype).exp()).transpose(-1, -2)
    if max(height, width) <= TILE:
        return decayed_pairs(left, right, left_sums, right_sums, causal_pairs(rows, columns, left.device))
    return _split(left, right, left_sums, right_sums, rows, columns)


def _split(left: Tensor, right: Tensor, left_sums: Tensor, right_sums: Tensor, rows: slice, columns: slice) -> Tensor:
    """Cut a block at a bound that only one side has, else both sides in halves."""
    candidates = (rows.start, rows.stop, columns.start, columns.stop)
    middle = rows.start + (rows.stop - rows.start) // 2
    row_cut = next((cut for cut in candidates if rows.start < cut < rows.stop), None)
    column_cut = next((cut for cut in candidates if columns.start < cut < columns.stop), None)
    if row_cut is None and column_cut is None:
        row_cut = column_cut = middle
    row_cut, column_cut = row_cut or rows.stop, column_cut or columns.stop
    parts = []
    for upper in (slice(rows.start, row_cut), slice(row_cut, rows.stop)):
        of_rows = slice(upper.start - rows.start, upper.stop - rows.start)
        across = []
        for side in (slice(columns.start, column_cut), slice(column_cut, columns.stop)):
            of_columns = slice(side.start - columns.start, side.stop - columns.start)
            across.append(
                decayed_entries(
                    left[..., of_rows, :],
                    right[..., of_columns, :],
                    left_sums[..., of_rows, :],
                    right_sums[..., of_columns, :],
                    upper,
                    side,
                )
            )
        parts.append(torch.cat(across, -1))
    return torch.cat(parts, -2)
