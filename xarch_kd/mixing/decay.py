"""Products of decays between tokens, accurate for any strength of decay, in float32 too.

The decay over tokens j < k <= i is exp(c_i − c_j), c the running sum of log decays. The running sum is kept in float64
and the difference is taken there: in float32 a long sum loses small differences. Exponents are never positive, so
nothing overflows; those of unused pairs are masked before the exponential.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

# exp(−1000) is 0 in float64 too; the bound keeps −∞ (a decay to 0) out of differences.
FLOOR: Final = -1000.0
# Tokens per tile if each channel has its own decay.
TILE: Final = 16
SMALL: Final = 2


def running_sum(log_decay: Tensor, axis: int) -> Tensor:
    """Return the float64 running sum of log decays along `axis`."""
    return log_decay.double().clamp(min=FLOOR).cumsum(axis)


def grouped_product(left: Tensor, right: Tensor, heads: int) -> Tensor:
    """Return left·rightᵀ [batch, heads, rows, columns].

    left [batch, left groups, rows, dim] and right [batch, right groups, columns, dim]: head h has group
    h // (heads / groups) of each. The product is computed once per group if left and right share groups.
    """
    groups = max(left.shape[1], right.shape[1])
    product = spread(left, groups) @ spread(right, groups).transpose(-1, -2)
    return spread(product, heads)


def spread(tensor: Tensor, heads: int) -> Tensor:
    """Return tensor [batch, groups, ...] with each group repeated for its heads: [batch, heads, ...]."""
    groups = tensor.shape[1]
    if groups == heads:
        return tensor
    # A view if there is one group.
    return tensor.unsqueeze(2).expand(-1, -1, heads // groups, *[-1] * (tensor.dim() - 2)).flatten(1, 2)


def causal_pairs(rows: slice, columns: slice, device: torch.device) -> Tensor:
    """Return the mask of pairs with column <= row, bool [rows, columns]."""
    row = torch.arange(rows.start, rows.stop, device=device)
    column = torch.arange(columns.start, columns.stop, device=device)
    return column <= row[:, None]


def same_pairs(rows: slice, columns: slice, device: torch.device) -> Tensor:
    """Return the mask of pairs with column = row, bool [rows, columns]."""
    row = torch.arange(rows.start, rows.stop, device=device)
    return torch.arange(columns.start, columns.stop, device=device) == row[:, None]


def remaining(later: Tensor, earlier: Tensor, dtype: torch.dtype, rate: Tensor | None = None) -> Tensor:
    """Return exp((c_later − c_earlier) rate) of float64 running sums; `rate` [heads, n] goes with axes 1 and −1."""
    exponent = (later - earlier).to(dtype)
    if rate is not None:
        exponent = exponent * rate.to(dtype).view(rate.shape[0], *[1] * (exponent.dim() - 3), rate.shape[1])
    return exponent.exp_() if not exponent.requires_grad else exponent.exp()


def scalar_pairs(left: Tensor, right: Tensor, left_sums: Tensor, right_sums: Tensor, causal: Tensor) -> Tensor:
    """Return left_i·right_j exp(c_i − c_j) [batch, heads, ..., rows, columns]; 0 where not causal.

    left and right [batch, groups, ..., tokens, n] (see `grouped_product`), sums [batch, heads, ..., tokens, 1].
    """
    exponent = (left_sums - right_sums.transpose(-1, -2)).to(left.dtype)
    decay = exponent.masked_fill_(~causal, float("-inf")).exp()
    return grouped_product(left, right, left_sums.shape[1]) * decay


def tile(left: Tensor, right: Tensor, sums: Tensor, rate: Tensor | None = None) -> Tensor:
    """Return Σ_n left_in right_jn exp((c_in − c_jn) rate_n) for j <= i, else 0, [batch, heads, ..., size, size].

    left and right [batch, groups, ..., size, n], float64 sums [batch, heads, ..., size, n or 1], rate [heads, n] or
    None. With one sum for all n and no rate there is one exponent per pair. Otherwise the size is a power of 2 and
    blocks of 1, 2, 4 … tokens are joined: the later block's rows and the earlier one's columns decay to their boundary.
    """
    size, heads = left.shape[-2], sums.shape[1]
    if sums.shape[-1] == 1 and rate is None:
        return scalar_pairs(left, right, sums, sums, causal_pairs(slice(0, size), slice(0, size), left.device))
    left, right = spread(left, heads), spread(right, heads)
    joined = (left * right).sum(-1)[..., None, None]
    half = 1
    while half < size:
        parts = (tensor.unflatten(-2, (-1, 2, half)).unbind(-3) for tensor in (left, right, sums))
        (_, rows), (columns, _), (before, after) = parts
        meeting = after[..., :1, :]
        rows = rows * remaining(after, meeting, left.dtype, rate)
        columns = columns * remaining(meeting, before, left.dtype, rate)
        earlier, later = joined.unflatten(-3, (-1, 2)).unbind(-3)
        lower = torch.cat([_products(rows, columns), later], -1)
        joined = torch.cat([functional.pad(earlier, (0, half)), lower], -2)
        half *= 2
    return joined.squeeze(-3)


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows·columnsᵀ; elementwise if very small, where batched matrix products are slow."""
    if rows.shape[-2] > SMALL:
        return rows @ columns.transpose(-1, -2)
    return (rows.unsqueeze(-2) * columns.unsqueeze(-3)).sum(-1)


def decayed_entries(
    left: Tensor,
    right: Tensor,
    left_sums: Tensor,
    right_sums: Tensor,
    rows: slice,
    columns: slice,
    rate: Tensor | None = None,
) -> Tensor:
    """Return Σ_n left_in right_jn exp((c_in − c_jn) rate_n) for j <= i, else 0, without a [rows, columns, n] tensor.

    The result is [batch, heads, rows, columns]; left [batch, heads, rows, n] and right [batch, heads, columns, n] hold
    the tokens of the slices, left_sums and right_sums [batch, heads, tokens, n or 1] are in float64, rate is [heads, n]
    or None. If all columns precede the rows, both sides decay to the first row: two exponents <= 0, one product.
    Other blocks are split until that holds or they are tiles small enough for all exponents.
    """
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if not height or not width or columns.start >= rows.stop:
        return left.new_zeros(*left.shape[:-2], height, width)
    if columns.stop <= rows.start + 1:
        meeting = left_sums[..., :1, :]
        near = left * remaining(left_sums, meeting, left.dtype, rate)
        return near @ (right * remaining(meeting, right_sums, left.dtype, rate)).transpose(-1, -2)
    if rows == columns and height & (height - 1) == 0 and height <= TILE:
        return tile(left, right, left_sums, rate)
    return _split(left, right, left_sums, right_sums, rows, columns, rate)


def _split(
    left: Tensor,
    right: Tensor,
    left_sums: Tensor,
    right_sums: Tensor,
    rows: slice,
    columns: slice,
    rate: Tensor | None,
) -> Tensor:
    """Split a block at a bound that only one side has, else both sides in halves."""
    candidates = (rows.start, rows.stop, columns.start, columns.stop)
    row_cut = next((cut for cut in candidates if rows.start < cut < rows.stop), None)
    column_cut = next((cut for cut in candidates if columns.start < cut < columns.stop), None)
    if row_cut is None and column_cut is None:
        # A power of 2, so that halving ends at tiles.
        row_cut = column_cut = rows.start + (1 << (rows.stop - rows.start - 1).bit_length() - 1)
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
                    rate,
                )
            )
        parts.append(torch.cat(across, -1))
    return torch.cat(parts, -2)
