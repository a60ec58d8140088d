"""Divergences and statistics of the rows of two softmax maps, with gradients of the student's query and key.

z = softcap(scale q·k), S and P the student's and a teacher's softmax, P̄_s = Σ_t W_st P_t, w_s = Σ_t W_st. Log-sum-exps
are computed first, so that both maps are normalized tile by tile and the gradient is one product with their difference:

    kl_i = Σ_j P̄_ij (log P̄_ij − log S_ij)          ∂/∂z_ij = w S_ij − P̄_ij
    (pp, pm, mm)_i = Σ_j (P̄², P̄ S, S²)_ij         ∂/∂z_ij = S_ij (a_i P̄_ij + b_i S_ij − a_i pm_i − b_i mm_i)

with a = ∂L/∂pm, b = 2 ∂L/∂mm, each times the softcap's slope. One program has one tile of rows (query gradients) or
of columns (key gradients, all rows and all heads of the key's group), so no sum runs over programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xarch_kd.kernels.mixing_blocks import blocks, launch, padded, parts
from xarch_kd.kernels.mixing_maps import (
    STUDENT,
    TEACHER,
    by_lists,
    columns_seen,
    from_first,
    from_last,
    head_lists,
    load_rows,
    load_valid,
    log_sum_exp,
    mixture,
    packed,
    rows_seeing,
    saved_dtype,
    scores,
    slope_dot,
    valid_ranges,
    visible,
)
from xarch_kd.kernels.tiles import softcap_slope, store_tile


@triton.jit
def softmax_rows(
    QS, KS, QT, KT, LSE_S, LSE_T, COUNT, INDEX, WEIGHT, TOTAL, VALID_RANGE, UPSTREAM, VALUES, SLOPES,
    qs_batch, qs_row, qs_head, ks_batch, ks_row, ks_head, qt_batch, qt_row, qt_head, kt_batch, kt_row, kt_head,
    time, HS, HKS, HT, HKT, scale_s, scale_t, cap_s, cap_t, slope_batch, slope_row, slope_head, plane,
    WIDTH_S: tl.constexpr, PADDED_S: tl.constexpr, WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr,
    CAUSAL_S: tl.constexpr, CAUSAL_T: tl.constexpr, WINDOW_S: tl.constexpr, WINDOW_T: tl.constexpr,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, MAPPED: tl.constexpr,
    KIND: tl.constexpr, WRITE_VALUES: tl.constexpr, WRITE_SLOPES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """VALUES of a tile of rows, and SLOPES: the query's gradient (before the upstream one for a divergence).

    KIND is "kl", "cross_entropy" (VALUES [batch, HS, time]) or "statistics" (VALUES pp, pm, mm, `plane` apart; UPSTREAM
    a, b, a pm + b mm, `plane` apart).
    """
    row0, which = from_last(time, BM)
    batch, head = which // HS, which % HS
    start_s, stop_s, start_t, stop_t, first, last = valid_ranges(VALID_RANGE, batch)
    rows = row0 + tl.arange(0, BM)
    of_rows = which.to(tl.int64) * time
    query = load_valid(
        QS + batch.to(tl.int64) * qs_batch + head.to(tl.int64) * qs_head, rows, qs_row, first, last, WIDTH_S, PADDED_S
    )
    keys = KS + batch.to(tl.int64) * ks_batch + (head // (HS // HKS)).to(tl.int64) * ks_head
    lse = load_rows(LSE_S + of_rows, rows, first, last, float("inf"))
    total = 1.0
    if MAPPED:
        total = tl.load(TOTAL + head)
    value, pm, mm = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    if WRITE_SLOPES:
        slope = tl.zeros([BM, PADDED_S], tl.float32)
        if KIND == "statistics":
            a = load_rows(UPSTREAM + of_rows, rows, first, last, 0.0)
            b = load_rows(UPSTREAM + plane + of_rows, rows, first, last, 0.0)
            c = load_rows(UPSTREAM + plane + plane + of_rows, rows, first, last, 0.0)
    low_s, high_s = columns_seen(row0, start_s, stop_s, CAUSAL_S, WINDOW_S, BM)
    low_t, high_t = columns_seen(row0, start_t, stop_t, CAUSAL_T, WINDOW_T, BM)
    low, high = tl.minimum(low_s, low_t) // BN * BN, tl.maximum(high_s, high_t)
    high = tl.where((row0 < last) & (row0 + BM > first), high, low)
    for column0 in range(low, high, BN):
        columns = column0 + tl.arange(0, BN)
        key = load_valid(keys, columns, ks_row, start_s, stop_s, WIDTH_S, PADDED_S)
        z = scores(query, key, scale_s, cap_s, CAPPED_S)
        seen = visible(rows, columns, start_s, stop_s, CAUSAL_S, WINDOW_S)
        log_s = tl.where(seen, z - lse[:, None], float("-inf"))
        p = mixture(
            QT, KT, LSE_T, COUNT, INDEX, WEIGHT, batch, head, rows, columns,
            visible(rows, columns, start_t, stop_t, CAUSAL_T, WINDOW_T), first, last, start_t, stop_t,
            qt_batch, qt_row, qt_head, kt_batch, kt_row, kt_head, time, HT, HKT, scale_t, cap_t,
            WIDTH_T, PADDED_T, CAPPED_T, MAPPED, BM, BN,
        )  # fmt: skip
        if WRITE_VALUES:
            if KIND == "kl":
                value += tl.sum(p * tl.where(p == 0, 0.0, tl.log(tl.maximum(p, 1e-37)) - log_s), 1)
            elif KIND == "cross_entropy":
                value -= tl.sum(p * tl.where(p == 0, 0.0, log_s), 1)
            elif KIND == "statistics":
                s = tl.exp(log_s)
                value += tl.sum(p * p, 1)
                pm += tl.sum(p * s, 1)
                mm += tl.sum(s * s, 1)
            else:
                tl.static_assert(False, "unknown KIND of a row of two softmax maps")
        if WRITE_SLOPES:
            s = tl.exp(log_s)
            if KIND == "statistics":
                dz = s * (a[:, None] * p + b[:, None] * s - c[:, None])
            elif KIND == "kl" or KIND == "cross_entropy":
                dz = tl.where(seen, total * s - p, 0.0)
            else:
                tl.static_assert(False, "unknown KIND of a row of two softmax maps")
            slope = slope_dot(dz * softcap_slope(z, cap_s, CAPPED_S), key, slope)
    if WRITE_VALUES:
        tl.store(VALUES + of_rows + rows, value, mask=rows < time)
        if KIND == "statistics":
            tl.store(VALUES + plane + of_rows + rows, pm, mask=rows < time)
            tl.store(VALUES + plane + plane + of_rows + rows, mm, mask=rows < time)
    if WRITE_SLOPES:
        base = SLOPES + batch.to(tl.int64) * slope_batch + head.to(tl.int64) * slope_head
        store_tile(base, slope * scale_s, rows, tl.arange(0, PADDED_S), slope_row, time, WIDTH_S)


@triton.jit
def softmax_columns(
    QS, KS, QT, KT, LSE_S, LSE_T, COUNT, INDEX, WEIGHT, TOTAL, VALID_RANGE, UPSTREAM, SLOPES,
    qs_batch, qs_row, qs_head, ks_batch, ks_row, ks_head, qt_batch, qt_row, qt_head, kt_batch, kt_row, kt_head,
    time, HS, HKS, HT, HKT, scale_s, scale_t, cap_s, cap_t, slope_part, slope_batch, slope_row, slope_head, plane,
    heads_each,
    WIDTH_S: tl.constexpr, PADDED_S: tl.constexpr, WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr,
    CAUSAL_S: tl.constexpr, CAUSAL_T: tl.constexpr, WINDOW_S: tl.constexpr, WINDOW_T: tl.constexpr,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, MAPPED: tl.constexpr,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """SLOPES [part, batch, time, HKS, width]: the key's gradient from `heads_each` of the query heads that share it.

    UPSTREAM is one number per row for a divergence, and a, b, a pm + b mm (`plane` apart) for statistics.
    """
    column0, which = from_first(time, BN)
    shares = HS // HKS // heads_each
    share, key_head, batch = which % shares, which // shares % HKS, which // shares // HKS
    start_s, stop_s, start_t, stop_t, first, last = valid_ranges(VALID_RANGE, batch)
    columns = column0 + tl.arange(0, BN)
    key = load_valid(
        KS + batch.to(tl.int64) * ks_batch + key_head.to(tl.int64) * ks_head,
        columns, ks_row, start_s, stop_s, WIDTH_S, PADDED_S,
    )  # fmt: skip
    slope = tl.zeros([BN, PADDED_S], tl.float32)
    low, high = rows_seeing(column0, first, last, CAUSAL_S, WINDOW_S, BN)
    low = low // BM * BM
    high = tl.where((column0 < stop_s) & (column0 + BN > start_s), high, low)
    for within in range(heads_each):
        head = key_head * (HS // HKS) + share * heads_each + within
        of_rows = (batch * HS + head).to(tl.int64) * time
        queries = QS + batch.to(tl.int64) * qs_batch + head.to(tl.int64) * qs_head
        total = 1.0
        if MAPPED:
            total = tl.load(TOTAL + head)
        for row0 in range(low, high, BM):
            rows = row0 + tl.arange(0, BM)
            query = load_valid(queries, rows, qs_row, first, last, WIDTH_S, PADDED_S)
            lse = load_rows(LSE_S + of_rows, rows, first, last, float("inf"))
            a = load_rows(UPSTREAM + of_rows, rows, first, last, 0.0)
            z = scores(query, key, scale_s, cap_s, CAPPED_S)
            seen = visible(rows, columns, start_s, stop_s, CAUSAL_S, WINDOW_S)
            s = tl.exp(tl.where(seen, z - lse[:, None], float("-inf")))
            p = mixture(
                QT, KT, LSE_T, COUNT, INDEX, WEIGHT, batch, head, rows, columns,
                visible(rows, columns, start_t, stop_t, CAUSAL_T, WINDOW_T), first, last, start_t, stop_t,
                qt_batch, qt_row, qt_head, kt_batch, kt_row, kt_head, time, HT, HKT, scale_t, cap_t,
                WIDTH_T, PADDED_T, CAPPED_T, MAPPED, BM, BN,
            )  # fmt: skip
            if KIND == "statistics":
                b = load_rows(UPSTREAM + plane + of_rows, rows, first, last, 0.0)
                c = load_rows(UPSTREAM + plane + plane + of_rows, rows, first, last, 0.0)
                dz = s * (a[:, None] * p + b[:, None] * s - c[:, None])
            elif KIND == "kl" or KIND == "cross_entropy":
                dz = tl.where(seen, total * s - p, 0.0) * a[:, None]
            else:
                tl.static_assert(False, "unknown KIND of a row of two softmax maps")
            slope = slope_dot(tl.trans(dz * softcap_slope(z, cap_s, CAPPED_S)), query, slope)
    base = (
        SLOPES + share.to(tl.int64) * slope_part + batch.to(tl.int64) * slope_batch + key_head.to(tl.int64) * slope_head
    )
    store_tile(base, slope * scale_s, columns, tl.arange(0, PADDED_S), slope_row, time, WIDTH_S)


class Pair(NamedTuple):
    """A student's and a teacher's softmax maps [batch, time, heads, width] with their settings, student first."""

    query: Tensor
    key: Tensor
    teacher_query: Tensor
    teacher_key: Tensor
    valid_range: Tensor
    head_map: Tensor | None
    scales: list[float]
    caps: list[float]
    causal: list[bool]
    windows: list[int]

    def packed(self) -> Pair:
        """Return the same pair in the layout of the kernels: adjacent entries in every row, a head map if needed."""
        tensors = {name: packed(getattr(self, name)) for name in self._fields[:4]}
        return self._replace(**tensors, head_map=by_lists(self.head_map, self.query.shape[2], *tensors.values()))

    def log_sum_exps(self) -> tuple[Tensor, Tensor]:
        """Return the log-sum-exps [batch, heads, time] of student and teacher."""
        of_student, of_teacher = (self.query, self.key), (self.teacher_query, self.teacher_key)
        settings = list(zip(self.scales, self.caps, self.causal, self.windows, strict=True))
        return (
            log_sum_exp(*of_student, self.valid_range, STUDENT.value, *settings[0]),
            log_sum_exp(*of_teacher, self.valid_range, TEACHER.value, *settings[1]),
        )

    def arguments(self, lse: Tensor, teacher_lse: Tensor) -> list[Any]:
        """Return the tensors that are the first arguments of every kernel of a pair."""
        lists = head_lists(self.head_map, self.query)
        return [*self[:4], lse, teacher_lse, *lists, self.valid_range]

    def numbers(self) -> list[Any]:
        """Return the strides, sizes and scales that every kernel of a pair takes after its tensors."""
        strides = [stride for tensor in self[:4] for stride in tensor.stride()[:3]]
        heads = [tensor.shape[2] for tensor in self[:4]]
        return [*strides, self.query.shape[1], *heads, *self.scales, *self.caps]

    def constants(self) -> dict[str, Any]:
        """Return the constants that every kernel of a pair is compiled for."""
        widths = (self.query.shape[3], self.teacher_query.shape[3])
        return {
            "WIDTH_S": widths[0],
            "PADDED_S": padded(widths[0]),
            "WIDTH_T": widths[1],
            "PADDED_T": padded(widths[1]),
            "CAUSAL_S": self.causal[0],
            "CAUSAL_T": self.causal[1],
            "WINDOW_S": self.windows[0],
            "WINDOW_T": self.windows[1],
            "CAPPED_S": self.caps[0] > 0,
            "CAPPED_T": self.caps[1] > 0,
            "MAPPED": self.head_map is not None,
        }


def compare_rows(
    pair: Pair, lses: tuple[Tensor, Tensor], kind: str, upstream: Tensor | None, want: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Run `softmax_rows` and return the values and the query's gradient, each empty unless requested by `want`."""
    batch, time, heads, _ = pair.query.shape
    write_values, write_slopes = want
    planes = (3, batch, heads, time) if kind == "statistics" else (batch, heads, time)
    values = pair.query.new_empty(planes if write_values else (0,), dtype=torch.float32)
    slopes = torch.empty(
        pair.query.shape if write_slopes else (0, 0, 0, 0), dtype=saved_dtype(pair.query), device=pair.query.device
    )
    cut = blocks("row slopes" if write_slopes else "values", *pair[:4])
    softmax_rows[(triton.cdiv(time, cut.rows) * batch * heads,)](
        *pair.arguments(*lses), values if upstream is None else upstream, values, slopes,
        *pair.numbers(), *slopes.stride()[:3], batch * heads * time,
        **pair.constants(), KIND=kind, WRITE_VALUES=write_values, WRITE_SLOPES=write_slopes, **launch(cut),
    )  # fmt: skip
    return values, slopes


def compare_columns(pair: Pair, lses: tuple[Tensor, Tensor], kind: str, upstream: Tensor) -> Tensor:
    """Run `softmax_columns` and return the key's gradient, in its dtype."""
    batch, time, heads, _ = pair.query.shape
    key_heads = pair.key.shape[2]
    cut = blocks("column slopes", *pair[:4])
    programs = triton.cdiv(time, cut.columns) * batch * key_heads
    shares = parts(programs, heads // key_heads)
    slopes = pair.key.new_empty(shares, *pair.key.shape, dtype=pair.key.dtype if shares == 1 else torch.float32)
    softmax_columns[(programs * shares,)](
        *pair.arguments(*lses), upstream, slopes,
        *pair.numbers(), *slopes.stride()[:4], batch * heads * time, heads // key_heads // shares,
        **pair.constants(), KIND=kind, **launch(cut),
    )  # fmt: skip
    return slopes.sum(0).to(pair.key.dtype) if shares > 1 else slopes[0]
