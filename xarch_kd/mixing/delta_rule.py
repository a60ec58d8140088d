"""Chunked gated delta rule: application to values, and blocks of entries.

In a chunk the corrected values are U = T (V − K⁺ S), with T = (I + tril(diag(beta) Γ∘K Kᵀ, −1))⁻¹ diag(beta), K⁺ the
keys decayed since before the chunk and S the state there (WY form, arXiv:2406.06484; with decay arXiv:2412.06464).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from xarch_kd.mixing.decay import tile
from xarch_kd.mixing.scan import chunk_sums, padded, recomputed


class Chunks(NamedTuple):
    """Intermediates of the delta rule for each chunk [batch, heads, chunks, size, ...].

    `sums` are running sums of log decays in float64, `opening` the keys decayed since before the chunk, `closing` the
    keys decayed until its end, `carry` the factor of the state over the chunk [..., n or 1, 1], `solved` the matrix T.
    """

    sums: Tensor
    opening: Tensor
    closing: Tensor
    carry: Tensor
    solved: Tensor


def prepare(key: Tensor, beta: Tensor, log_decay: Tensor) -> Chunks:
    """Return the intermediates for keys [batch, heads, chunks, size, dim] and their beta and log decays."""
    sums = chunk_sums(log_decay)
    inner = tile(key, key, sums) * beta.unsqueeze(-1)
    # The diagonal is taken as ones and nothing above it is read.
    solved = torch.linalg.solve_triangular(inner, torch.diag_embed(beta), upper=False, unitriangular=True)
    end = sums[..., -1:, :]
    opening, closing = key * sums.to(key.dtype).exp(), key * (end - sums).to(key.dtype).exp()
    return Chunks(sums, opening, closing, end.to(key.dtype).exp().transpose(-1, -2), solved)


def delta_segment(
    query: Tensor, key: Tensor, beta: Tensor, log_decay: Tensor, values: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the outputs of chunks [batch, heads, chunks, size, dim] in order, and the state after them.

    query and key [batch, heads, chunks, size, dim], beta [batch, heads, chunks, size], log_decay like beta or like
    key, state [batch, heads, key dim, value dim].
    """
    chunks = prepare(key, beta, log_decay)
    fresh, known = chunks.solved @ values, chunks.solved @ chunks.opening
    incoming, corrected = [], []
    parts = (tensor.unbind(2) for tensor in (fresh, known, chunks.closing.transpose(-1, -2), chunks.carry))
    for chunk_fresh, chunk_known, closing, carry in zip(*parts, strict=True):
        incoming.append(state)
        corrected.append(chunk_fresh - chunk_known @ state)
        state = carry * state + closing @ corrected[-1]
    inner = tile(query, key, chunks.sums) @ torch.stack(corrected, 2)
    return inner + (query * chunks.sums.to(query.dtype).exp()) @ torch.stack(incoming, 2), state


def delta_rows(
    query: Tensor,
    key: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    rows: slice,
    columns: slice,
    *,
    size: int,
) -> Tensor:
    """Return entries [batch, heads, rows, columns] of the delta rule's matrix, for factors [batch, heads, time, ...].

    Chunks are processed from last to first: a row's query, decayed to a chunk's end, is multiplied by the chunk's keys
    and T, which gives the row's entries there; their effect on the state before the chunk is subtracted from the query,
    which is passed on to the previous chunk. Rows enter at their own chunk. Memory: rows × (columns + dim), plus the
    pairs of one chunk.
    """
    shape = (*query.shape[:2], rows.stop - rows.start, columns.stop - columns.start)
    if 0 in shape or columns.start >= rows.stop:
        return query.new_zeros(shape)
    size = min(size, 1 << (query.shape[2] - 1).bit_length())
    first = columns.start // size * size
    chunks = _chunks((query, key, beta, log_decay), slice(first, rows.stop), size)
    asked, tiles = query[:, :, :0], []
    for index in reversed(range(len(chunks))):
        begin = first + index * size
        here = slice(max(rows.start - begin, 0), min(rows.stop - begin, size))
        inner, opened, step = recomputed(_row_chunk, *chunks[index])
        if here.start < here.stop:
            weights = torch.cat([inner[:, :, here], asked @ step.closing.transpose(-1, -2)], 2)
            asked = torch.cat([opened[:, :, here], asked * step.carry.transpose(-1, -2)], 2)
        else:
            weights, asked = asked @ step.closing.transpose(-1, -2), asked * step.carry.transpose(-1, -2)
        entries = weights @ step.solved
        asked = asked - entries @ step.opening
        if begin < columns.stop:
            tiles.append(functional.pad(entries, (0, 0, shape[2] - entries.shape[2], 0)))
    found = torch.cat(tiles[::-1], -1)
    missing = max(columns.stop - first - found.shape[-1], 0)
    return functional.pad(found, (0, missing))[..., columns.start - first : columns.stop - first]


def _chunks(factors: tuple[Tensor, ...], tokens: slice, size: int) -> list[tuple[Tensor, ...]]:
    """Return the factors [batch, heads, 1, size, ...] of each chunk of these tokens, zero-padded."""
    padding = -(tokens.stop - tokens.start) % size
    cut = [padded(tensor[:, :, tokens], padding).unflatten(2, (-1, size)).split(1, 2) for tensor in factors]
    return list(zip(*cut, strict=True))


def _row_chunk(query: Tensor, key: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Chunks]:
    """Return a chunk's query-key products, its queries decayed to its start, and its other factors."""
    chunk = Chunks(*(tensor.squeeze(2) for tensor in prepare(key, beta, log_decay)))
    query = query.squeeze(2)
    inner = tile(query, key.squeeze(2), chunk.sums)
    return inner, query * chunk.sums.to(query.dtype).exp(), chunk
