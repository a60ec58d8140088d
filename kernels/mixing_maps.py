"""Shared parts of the kernels of `mixing_distance`: valid ranges, masks, softmax tiles, mixtures of teacher heads.

Letters: a map has rows i and columns j; a tile is BM rows × BN columns. `VALID_RANGE` [batch, 4] (int32) holds the
valid range of each sequence: the student's start and stop, then the teacher's. A row is valid if it is in both ranges;
a column is valid for a map if it is in that map's range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xarch_kd.kernels.mixing_blocks import back_end, blocks, launch, padded, widest_dtype
from xarch_kd.kernels.tiles import dot, finite_or_zero, softcap

STUDENT, TEACHER = tl.constexpr(0), tl.constexpr(2)


def by_lists(head_map: Tensor | None, heads: int, *tensors: Tensor) -> Tensor | None:
    """Return the head map that kernels read, or None if head h is compared with head h and they read none.

    In float32 on NVIDIA GPUs they always read one: without it the teacher's query is constant in the loop, a product
    without tensor cores holds it in registers, and there are not enough of them.
    """
    if head_map is None and back_end() == "cuda" and widest_dtype(*tensors) == "float32":
        return torch.eye(heads, device=tensors[0].device)
    return head_map


def head_lists(head_map: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each student head's teacher heads: count [Hs], indices [Hs, Ht], weights [Hs, Ht], sum of weights [Hs].

    The lists have room for every teacher head, so that nothing is read back from the device. Without a head map all
    four are placeholders.
    """
    if head_map is None:
        nothing = torch.zeros(1, dtype=torch.int32, device=like.device)
        weight = torch.ones(1, dtype=torch.float32, device=like.device)
        return nothing, nothing, weight, weight
    weight = head_map.detach().to(like.device, torch.float32)
    used = weight != 0
    order = torch.argsort(used.logical_not().int(), dim=1, stable=True)
    return used.sum(1).int(), order.int().contiguous(), weight.gather(1, order).contiguous(), weight.sum(1)


def packed(tensor: Tensor) -> Tensor:
    """Return the tensor with adjacent entries along its last axis."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def saved_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that stores a gradient before its product with the upstream one: float32 instead of float16."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


@triton.jit
def valid_ranges(VALID_RANGE, batch):
    """Start and stop of the student's valid range, of the teacher's, and of the rows in both."""
    student_start, student_stop = tl.load(VALID_RANGE + batch * 4), tl.load(VALID_RANGE + batch * 4 + 1)
    start, stop = tl.load(VALID_RANGE + batch * 4 + 2), tl.load(VALID_RANGE + batch * 4 + 3)
    return student_start, student_stop, start, stop, tl.maximum(student_start, start), tl.minimum(student_stop, stop)


@triton.jit
def columns_seen(row0, start, stop, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr):
    """First column, and one past the last, that is visible to any row of the tile at row0."""
    low = start
    if WINDOW > 0:
        low = tl.maximum(low, row0 - WINDOW + 1)
    high = stop
    if CAUSAL:
        high = tl.minimum(high, row0 + BM)
    return low, high


@triton.jit
def rows_seeing(column0, first, last, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BN: tl.constexpr):
    """First row, and one past the last, to which any column of the tile at column0 is visible."""
    low = first
    if CAUSAL:
        low = tl.maximum(low, column0)
    high = last
    if WINDOW > 0:
        high = tl.minimum(high, column0 + BN + WINDOW - 1)
    return low, high


@triton.jit
def visible(rows, columns, start, stop, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Mask of the columns visible to each row; invalid rows are masked by their log-sum-exp of +inf instead."""
    seen = ((columns >= start) & (columns < stop))[None, :] & (rows >= 0)[:, None]
    if CAUSAL:
        seen = seen & (columns[None, :] <= rows[:, None])
    if WINDOW > 0:
        seen = seen & (rows[:, None] - columns[None, :] < WINDOW)
    return seen


@triton.jit
def load_valid(base, rows, row_stride, first, last, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """base[rows, :WIDTH], 0 in rows outside of first..last: the content of invalid rows is never read."""
    columns = tl.arange(0, PADDED)
    inside = ((rows >= first) & (rows < last))[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_rows(base, rows, first, last, otherwise):
    """One number per row, `otherwise` outside of first..last."""
    return tl.load(base + rows, mask=(rows >= first) & (rows < last), other=otherwise)


@triton.jit
def scores(query, key, scale, cap, CAPPED: tl.constexpr):
    """softcap(scale q·k)."""
    return softcap(dot(query, tl.trans(key)) * scale, cap, CAPPED)


@triton.jit
def slope_dot(slopes, operand, accumulator):
    """slopes @ operand + accumulator, slopes rounded to the operand's dtype.

    float16 has no room for slopes (a mean over a million rows): they are multiplied as tf32, which has its mantissa.
    """
    if operand.dtype == tl.float16:
        product = tl.dot(slopes, operand.to(tl.float32), acc=accumulator, input_precision="tf32")
    else:
        product = dot(slopes.to(operand.dtype), operand, accumulator)
    return product


@triton.jit
def from_last(time, BM: tl.constexpr):
    """First row of this program's tile, the last tile first (its rows are the longest), and the index of its map."""
    tiles = tl.cdiv(time, BM)
    maps = tl.num_programs(0) // tiles
    return (tiles - 1 - tl.program_id(0) // maps) * BM, tl.program_id(0) % maps


@triton.jit
def from_first(time, BN: tl.constexpr):
    """First column of this program's tile, the first tile first (its columns are the longest), and its map's index."""
    maps = tl.num_programs(0) // tl.cdiv(time, BN)
    return tl.program_id(0) // maps * BN, tl.program_id(0) % maps


@triton.jit
def probabilities(
    QT, KT, LSE_T, batch, head, rows, columns, seen, first, last, start, stop,
    q_batch, q_row, q_head, k_batch, k_row, k_head, time, heads, key_heads, scale, cap,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One teacher head's tile of P = exp(z - LSE)."""
    queries = QT + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    keys = KT + batch.to(tl.int64) * k_batch + (head // (heads // key_heads)).to(tl.int64) * k_head
    query = load_valid(queries, rows, q_row, first, last, WIDTH, PADDED)
    key = load_valid(keys, columns, k_row, start, stop, WIDTH, PADDED)
    lse = load_rows(LSE_T + (batch * heads + head).to(tl.int64) * time, rows, first, last, float("inf"))
    return tl.exp(tl.where(seen, scores(query, key, scale, cap, CAPPED) - lse[:, None], float("-inf")))


@triton.jit
def mixture(
    QT, KT, LSE_T, COUNT, INDEX, WEIGHT, batch, head, rows, columns, seen, first, last, start, stop,
    q_batch, q_row, q_head, k_batch, k_row, k_head, time, heads, key_heads, scale, cap,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, CAPPED: tl.constexpr, MAPPED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The tile of P̄ for one student head: its teacher heads, normalized and then mixed in registers."""
    if MAPPED:
        mixed = tl.zeros([BM, BN], tl.float32)
        for entry in range(tl.load(COUNT + head)):
            which = tl.load(INDEX + head * heads + entry)
            mixed += tl.load(WEIGHT + head * heads + entry) * probabilities(
                QT, KT, LSE_T, batch, which, rows, columns, seen, first, last, start, stop,
                q_batch, q_row, q_head, k_batch, k_row, k_head, time, heads, key_heads, scale, cap,
                WIDTH, PADDED, CAPPED,
            )  # fmt: skip
    else:
        mixed = probabilities(
            QT, KT, LSE_T, batch, head, rows, columns, seen, first, last, start, stop,
            q_batch, q_row, q_head, k_batch, k_row, k_head, time, heads, key_heads, scale, cap,
            WIDTH, PADDED, CAPPED,
        )  # fmt: skip
    return mixed


@triton.jit
def lse_kernel(
    Q, K, VALID_RANGE, LSE, q_batch, q_row, q_head, k_batch, k_row, k_head, time, heads, key_heads, scale, cap,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """LSE [batch, heads, time] of every row's scores; +inf in an invalid row, so that exp(z - LSE) is 0."""
    row0, which = from_last(time, BM)
    batch, head = which // heads, which % heads
    start, stop = tl.load(VALID_RANGE + batch * 4 + SIDE), tl.load(VALID_RANGE + batch * 4 + SIDE + 1)
    rows = row0 + tl.arange(0, BM)
    query = load_valid(
        Q + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head, rows, q_row, start, stop, WIDTH, PADDED
    )
    keys = K + batch.to(tl.int64) * k_batch + (head // (heads // key_heads)).to(tl.int64) * k_head
    maximum, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    low, high = columns_seen(row0, start, stop, CAUSAL, WINDOW, BM)
    for column0 in range(low // BN * BN, high, BN):
        columns = column0 + tl.arange(0, BN)
        key = load_valid(keys, columns, k_row, start, stop, WIDTH, PADDED)
        seen = visible(rows, columns, start, stop, CAUSAL, WINDOW)
        z = tl.where(seen, scores(query, key, scale, cap, CAPPED), float("-inf"))
        new = tl.maximum(maximum, tl.max(z, 1))
        # If a window leaves a row's first tile empty, the maximum is still -inf.
        safe = finite_or_zero(new)
        total = total * tl.exp(maximum - safe) + tl.sum(tl.exp(z - safe[:, None]), 1)
        maximum = new
    valid = (rows >= start) & (rows < stop)
    lse = tl.where(valid, maximum + tl.log(tl.where(valid, total, 1.0)), float("inf"))
    tl.store(LSE + which.to(tl.int64) * time + rows, lse, mask=rows < time)


def log_sum_exp(
    query: Tensor, key: Tensor, valid_range: Tensor, side: int, scale: float, cap: float, causal: bool, window: int
) -> Tensor:
    """Return the log-sum-exp [batch, heads, time] (float32) of the rows of one softmax map."""
    batch, time, heads, width = query.shape
    cut = blocks("lse", query, key)
    lse = query.new_empty(batch, heads, time, dtype=torch.float32)
    lse_kernel[(triton.cdiv(time, cut.rows) * batch * heads,)](
        query, key, valid_range, lse, *query.stride()[:3], *key.stride()[:3], time, heads, key.shape[2], scale, cap,
        SIDE=side, WIDTH=width, PADDED=padded(width), CAUSAL=causal, WINDOW=window, CAPPED=cap > 0,
        **launch(cut),
    )  # fmt: skip
    return lse
