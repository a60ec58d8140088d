"""Statistics of the rows of a softmax map and of an SSD map (Mamba-2), with gradients of the SSD factors.

    M_ij = e_ij (C_i·B_j) dt_j + D δ_ij,  e_ij = exp(c_i − c_j),  c the running sum of log_decay
    (pp, pm, mm)_i = Σ_j (P̄², P̄ M, M²)_ij,  ∂L/∂M_ij = a_i P̄_ij + b_i M_ij  with a = ∂L/∂pm, b = 2 ∂L/∂mm

Kernels sum over j < i only; the diagonal, in which e is 1, is one number per row and is added outside of the kernels,
because it cancels in the decay's gradient. The two halves of that gradient need no further sums: a row's is a pm + b mm
(below the diagonal), a column's is dt_j Σ_i (∂L/∂M e C·B)_ij, which is dt_j times the gradient of dt.

Heads of a group share C and B: the tile of C·B is computed once, an inner loop runs over heads, and their gradients are
summed before one product. Sums per head are added to memory by relaxed atomics, at addresses to which only one program
adds, in order. c is stored as two float32 numbers, the second being the rounding error of the first against the
float64 sum, so that differences of long sums have the relative accuracy of float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xarch_kd.kernels.mixing_blocks import blocks, launch, padded, parts
from xarch_kd.kernels.mixing_maps import (
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
    slope_dot,
    valid_ranges,
    visible,
)
from xarch_kd.kernels.tiles import dot, softcap, store_tile

# exp of less is 0 in float64 too; the bound keeps −∞, a decay to 0, out of differences.
FLOOR = -1000.0


@triton.jit
def decays(SUMS, plane, rows, columns, seen, first, last, start, stop):
    """exp(c_i − c_j) in visible entries of valid rows, else 0; masked before the exponential, which could overflow."""
    row = load_rows(SUMS, rows, first, last, float("-inf"))
    column = load_rows(SUMS, columns, start, stop, 0.0)
    row_rest = load_rows(SUMS + plane, rows, first, last, 0.0)
    column_rest = load_rows(SUMS + plane, columns, start, stop, 0.0)
    exponent = (row[:, None] - column[None, :]) + (row_rest[:, None] - column_rest[None, :])
    return tl.exp(tl.where(seen, exponent, float("-inf")))


@triton.jit
def ssd_rows(
    C, B, SUMS, DT, QT, KT, LSE_T, COUNT, INDEX, WEIGHT, VALID_RANGE, UPSTREAM, VALUES, SLOPES,
    c_batch, c_row, c_group, b_batch, b_row, b_group, qt_batch, qt_row, qt_head, kt_batch, kt_row, kt_head,
    time, HS, G, HT, HKT, scale_t, cap_t, slope_part, slope_batch, slope_row, slope_group, plane, heads_each,
    STATE: tl.constexpr, PADDED_S: tl.constexpr, WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr,
    WINDOW_T: tl.constexpr, CAPPED_T: tl.constexpr, MAPPED: tl.constexpr,
    WRITE_SLOPES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add pp, pm, mm below the diagonal to VALUES [3, batch, HS, time], or write C's gradient to SLOPES.

    SLOPES [part, batch, time, G, STATE] from a and b, UPSTREAM [2, batch, HS, time]. One program: a tile of rows and
    `heads_each` heads of a group.
    """
    row0, which = from_last(time, BM)
    shares = HS // G // heads_each
    share, group, batch = which % shares, which // shares % G, which // shares // G
    start_s, stop_s, start_t, stop_t, first, last = valid_ranges(VALID_RANGE, batch)
    rows = row0 + tl.arange(0, BM)
    left = load_valid(
        C + batch.to(tl.int64) * c_batch + group.to(tl.int64) * c_group, rows, c_row, first, last, STATE, PADDED_S
    )
    rights = B + batch.to(tl.int64) * b_batch + group.to(tl.int64) * b_group
    slope = tl.zeros([BM, PADDED_S], tl.float32)
    low_s, high = columns_seen(row0, start_s, stop_s, True, 0, BM)
    low_t, high_t = columns_seen(row0, start_t, stop_t, True, WINDOW_T, BM)
    low, high = tl.minimum(low_s, low_t) // BN * BN, tl.maximum(high, high_t)
    high = tl.where((row0 < last) & (row0 + BM > first), high, low)
    for column0 in range(low, high, BN):
        columns = column0 + tl.arange(0, BN)
        right = load_valid(rights, columns, b_row, start_s, stop_s, STATE, PADDED_S)
        product = dot(left, tl.trans(right))
        below = columns[None, :] < rows[:, None]
        seen_s = visible(rows, columns, start_s, stop_s, False, 0) & below
        seen_t = visible(rows, columns, start_t, stop_t, False, WINDOW_T) & below
        mixed = tl.zeros([BM, BN], tl.float32)
        for within in range(heads_each):
            head = group * (HS // G) + share * heads_each + within
            of_rows = (batch * HS + head).to(tl.int64) * time
            step = load_rows(DT + of_rows, columns, start_s, stop_s, 0.0)
            weight = decays(SUMS + of_rows, plane, rows, columns, seen_s, first, last, start_s, stop_s) * step[None, :]
            m = product * weight
            p = mixture(
                QT, KT, LSE_T, COUNT, INDEX, WEIGHT, batch, head, rows, columns, seen_t, first, last, start_t, stop_t,
                qt_batch, qt_row, qt_head, kt_batch, kt_row, kt_head, time, HT, HKT, scale_t, cap_t,
                WIDTH_T, PADDED_T, CAPPED_T, MAPPED, BM, BN,
            )  # fmt: skip
            if WRITE_SLOPES:
                a = load_rows(UPSTREAM + of_rows, rows, first, last, 0.0)
                b = load_rows(UPSTREAM + plane + of_rows, rows, first, last, 0.0)
                mixed += (a[:, None] * p + b[:, None] * m) * weight
            else:
                place = VALUES + of_rows + rows
                tl.atomic_add(place, tl.sum(p * p, 1), mask=rows < time, sem="relaxed")
                tl.atomic_add(place + plane, tl.sum(p * m, 1), mask=rows < time, sem="relaxed")
                tl.atomic_add(place + plane + plane, tl.sum(m * m, 1), mask=rows < time, sem="relaxed")
        if WRITE_SLOPES:
            slope = slope_dot(mixed, right, slope)
    if WRITE_SLOPES:
        base = SLOPES + share.to(tl.int64) * slope_part + batch.to(tl.int64) * slope_batch
        store_tile(base + group.to(tl.int64) * slope_group, slope, rows, tl.arange(0, PADDED_S), slope_row, time, STATE)


@triton.jit
def ssd_columns(
    C, B, SUMS, DT, QT, KT, LSE_T, COUNT, INDEX, WEIGHT, VALID_RANGE, UPSTREAM, STEPS, SLOPES,
    c_batch, c_row, c_group, b_batch, b_row, b_group, qt_batch, qt_row, qt_head, kt_batch, kt_row, kt_head,
    time, HS, G, HT, HKT, scale_t, cap_t, slope_part, slope_batch, slope_row, slope_group, plane, heads_each,
    STATE: tl.constexpr, PADDED_S: tl.constexpr, WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr,
    WINDOW_T: tl.constexpr, CAPPED_T: tl.constexpr, MAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write B's gradient to SLOPES [part, batch, time, G, STATE] and add dt's to STEPS [batch, HS, time].

    Both without the diagonal. One program: a tile of columns and `heads_each` heads of a group.
    """
    column0, which = from_first(time, BN)
    shares = HS // G // heads_each
    share, group, batch = which % shares, which // shares % G, which // shares // G
    start_s, stop_s, start_t, stop_t, first, last = valid_ranges(VALID_RANGE, batch)
    columns = column0 + tl.arange(0, BN)
    right = load_valid(
        B + batch.to(tl.int64) * b_batch + group.to(tl.int64) * b_group,
        columns,
        b_row,
        start_s,
        stop_s,
        STATE,
        PADDED_S,
    )
    lefts = C + batch.to(tl.int64) * c_batch + group.to(tl.int64) * c_group
    slope = tl.zeros([BN, PADDED_S], tl.float32)
    low = tl.maximum(first, column0) // BM * BM
    high = tl.where((column0 < stop_s) & (column0 + BN > start_s), last, low)
    for row0 in range(low, high, BM):
        rows = row0 + tl.arange(0, BM)
        left = load_valid(lefts, rows, c_row, first, last, STATE, PADDED_S)
        product = dot(left, tl.trans(right))
        below = columns[None, :] < rows[:, None]
        seen_s = visible(rows, columns, start_s, stop_s, False, 0) & below
        seen_t = visible(rows, columns, start_t, stop_t, False, WINDOW_T) & below
        mixed = tl.zeros([BM, BN], tl.float32)
        for within in range(heads_each):
            head = group * (HS // G) + share * heads_each + within
            of_rows = (batch * HS + head).to(tl.int64) * time
            step = load_rows(DT + of_rows, columns, start_s, stop_s, 0.0)
            decay = decays(SUMS + of_rows, plane, rows, columns, seen_s, first, last, start_s, stop_s)
            p = mixture(
                QT, KT, LSE_T, COUNT, INDEX, WEIGHT, batch, head, rows, columns, seen_t, first, last, start_t, stop_t,
                qt_batch, qt_row, qt_head, kt_batch, kt_row, kt_head, time, HT, HKT, scale_t, cap_t,
                WIDTH_T, PADDED_T, CAPPED_T, MAPPED, BM, BN,
            )  # fmt: skip
            a = load_rows(UPSTREAM + of_rows, rows, first, last, 0.0)
            b = load_rows(UPSTREAM + plane + of_rows, rows, first, last, 0.0)
            dm = (a[:, None] * p + b[:, None] * (product * decay * step[None, :])) * decay
            mixed += dm * step[None, :]
            tl.atomic_add(STEPS + of_rows + columns, tl.sum(dm * product, 0), mask=columns < time, sem="relaxed")
        slope = slope_dot(tl.trans(mixed), left, slope)
    base = (
        SLOPES + share.to(tl.int64) * slope_part + batch.to(tl.int64) * slope_batch + group.to(tl.int64) * slope_group
    )
    store_tile(base, slope, columns, tl.arange(0, PADDED_S), slope_row, time, STATE)


@triton.jit
def teacher_diagonal(
    QT, KT, LSE_T, COUNT, INDEX, WEIGHT, VALID_RANGE, VALUES,
    qt_batch, qt_row, qt_head, kt_batch, kt_row, kt_head, time, HS, HT, HKT, scale_t, cap_t,
    WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr, CAPPED_T: tl.constexpr, MAPPED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write the mixture's diagonal P̄_ii to VALUES [batch, HS, time]."""
    row0, which = from_last(time, BM)
    batch, head = which // HS, which % HS
    _start_s, _stop_s, _start_t, _stop_t, first, last = valid_ranges(VALID_RANGE, batch)
    rows = row0 + tl.arange(0, BM)
    mixed = tl.zeros([BM], tl.float32)
    count = 1
    if MAPPED:
        count = tl.load(COUNT + head)
    for entry in range(count):
        teacher, weight = head, 1.0
        if MAPPED:
            teacher, weight = tl.load(INDEX + head * HT + entry), tl.load(WEIGHT + head * HT + entry)
        queries = QT + batch.to(tl.int64) * qt_batch + teacher.to(tl.int64) * qt_head
        keys = KT + batch.to(tl.int64) * kt_batch + (teacher // (HT // HKT)).to(tl.int64) * kt_head
        query = load_valid(queries, rows, qt_row, first, last, WIDTH_T, PADDED_T).to(tl.float32)
        key = load_valid(keys, rows, kt_row, first, last, WIDTH_T, PADDED_T).to(tl.float32)
        z = softcap(tl.sum(query * key, 1) * scale_t, cap_t, CAPPED_T)
        lse = load_rows(LSE_T + (batch * HT + teacher).to(tl.int64) * time, rows, first, last, float("inf"))
        mixed += weight * tl.exp(z - lse)
    tl.store(VALUES + which.to(tl.int64) * time + rows, mixed, mask=rows < time)


class SSDPair(NamedTuple):
    """A student's SSD factors and a teacher's causal softmax map.

    C, B [batch, time, groups, state], log_decay and dt [batch, time, heads], D [heads] or None; teacher_query,
    teacher_key [batch, time, teacher heads, width]; a cap or window of 0 means none.
    """

    C: Tensor
    B: Tensor
    log_decay: Tensor
    dt: Tensor
    D: Tensor | None
    teacher_query: Tensor
    teacher_key: Tensor
    valid_range: Tensor
    head_map: Tensor | None
    scale: float
    cap: float
    window: int

    def packed(self) -> SSDPair:
        """Return the same pair in the layout of the kernels: adjacent entries in every row, a head map if needed."""
        tensors = {name: packed(getattr(self, name)) for name in ("C", "B", "teacher_query", "teacher_key")}
        return self._replace(**tensors, head_map=by_lists(self.head_map, self.dt.shape[2], *tensors.values()))

    @property
    def by_width(self) -> tuple[Tensor, ...]:
        """The operands of products, which determine the tile sizes."""
        return self.C, self.B, self.teacher_query, self.teacher_key

    def valid(self, start: int = 0, stop: int = 1) -> Tensor:
        """Return the mask of the tokens between these columns of `valid_range`, bool [batch, time].

        The default columns are the student's.
        """
        position = torch.arange(self.C.shape[1], device=self.C.device)
        return (position >= self.valid_range[:, start, None]) & (position < self.valid_range[:, stop, None])

    def valid_rows(self) -> Tensor:
        """Return the mask of rows that are valid in both maps, bool [batch, 1, time]."""
        return (self.valid() & self.valid(2, 3))[:, None]

    def sums(self) -> Tensor:
        """Return c [2, batch, heads, time] as float32 and its rounding error."""
        steps = torch.where(self.valid()[..., None], self.log_decay.double().clamp(min=FLOOR), 0.0)
        total = steps.cumsum(1).transpose(1, 2)
        return torch.stack([total.float(), (total - total.float().double()).float()])

    def steps(self) -> Tensor:
        """Return dt [batch, heads, time] in float32."""
        return torch.where(self.valid()[..., None], self.dt.float(), 0.0).transpose(1, 2).contiguous()

    def wide(self, tensor: Tensor) -> Tensor:
        """Return C or B in float32, 0 at invalid tokens."""
        return torch.where(self.valid()[..., None, None], tensor.float(), 0.0)

    def products(self) -> Tensor:
        """Return C_i·B_i [batch, heads, time]."""
        each = (self.wide(self.C) * self.wide(self.B)).sum(-1).transpose(1, 2)
        return each.repeat_interleave(self.dt.shape[2] // each.shape[1], 1)

    def diagonal(self, steps: Tensor) -> Tensor:
        """Return M_ii [batch, heads, time], 0 in invalid rows."""
        entries = self.products() * steps
        entries = entries if self.D is None else entries + self.D.float()[:, None]
        return torch.where(self.valid_rows(), entries, 0.0)

    def teacher_arguments(self, teacher_lse: Tensor) -> list[Any]:
        """Return the tensors of the teacher that every kernel takes."""
        return [
            self.teacher_query,
            self.teacher_key,
            teacher_lse,
            *head_lists(self.head_map, self.C)[:3],
            self.valid_range,
        ]

    def numbers(self) -> list[Any]:
        """Return the strides, sizes and scales that `ssd_rows` and `ssd_columns` take."""
        strides = [stride for tensor in self.by_width for stride in tensor.stride()[:3]]
        heads = [self.dt.shape[2], self.C.shape[2], self.teacher_query.shape[2], self.teacher_key.shape[2]]
        return [*strides, self.C.shape[1], *heads, self.scale, self.cap]

    def constants(self) -> dict[str, Any]:
        """Return the constants that `ssd_rows` and `ssd_columns` are compiled for."""
        state, width = self.C.shape[3], self.teacher_query.shape[3]
        student = {"STATE": state, "PADDED_S": padded(state), "WINDOW_T": self.window}
        return {**student, "WIDTH_T": width, "PADDED_T": padded(width), "CAPPED_T": self.cap > 0, "MAPPED": self.mapped}

    @property
    def mapped(self) -> bool:
        """True if student heads have mixtures of teacher heads."""
        return self.head_map is not None


def statistics(pair: SSDPair) -> tuple[Tensor, Tensor, Tensor]:
    """Return pp, pm, mm of each row [3, batch, heads, time] (float64); a tensor for `gradients`; the teacher's LSE.

    The second holds pm and mm without the diagonal, and P̄_ii.
    """
    batch, time, heads = pair.dt.shape
    teacher_lse = log_sum_exp(
        pair.teacher_query, pair.teacher_key, pair.valid_range, TEACHER.value, pair.scale, pair.cap, True, pair.window
    )
    below, steps = torch.zeros(3, batch, heads, time, dtype=torch.float32, device=pair.C.device), pair.steps()
    _run_rows(pair, teacher_lse, steps, below, below, write_slopes=False)
    teacher, student = _teacher_diagonal(pair, teacher_lse), pair.diagonal(steps)
    # In float64: if the diagonal is nearly the whole row, its slope a P̄ + b M nearly cancels.
    whole = below + torch.stack([teacher.double() ** 2, teacher.double() * student, student.double() ** 2])
    return whole, torch.stack([below[1], below[2], teacher]), teacher_lse


def gradients(
    pair: SSDPair, saved: Tensor, teacher_lse: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of C, B, log_decay, dt, D (empty without one).

    a, b [batch, heads, time]; saved and teacher_lse are the second and third result of `statistics`.
    """
    rows = pair.valid_rows()
    exact = torch.stack([torch.where(rows, a, 0.0), torch.where(rows, b, 0.0)]).double()
    (a, b), upstream, (pm, mm, teacher), steps = exact.unbind(), exact.float(), saved.unbind(), pair.steps()
    on_diagonal = (a * teacher + b * pair.diagonal(steps)).float()
    of_group = (on_diagonal * steps).unflatten(1, (pair.C.shape[2], -1)).sum(2).transpose(1, 2)[..., None]
    empty = pair.C.new_empty(0)
    of_c = _run_rows(pair, teacher_lse, steps, upstream, empty, write_slopes=True) + of_group * pair.wide(pair.B)
    below = torch.zeros_like(steps)
    of_b = _run_columns(pair, teacher_lse, steps, upstream, below) + of_group * pair.wide(pair.C)
    of_steps = below + on_diagonal * pair.products()
    of_sums = a * pm + b * mm - steps.double() * below.double()
    of_decay = of_sums.flip(-1).cumsum(-1).flip(-1).transpose(1, 2).masked_fill(~pair.valid()[..., None], 0)
    return (
        of_c.to(pair.C.dtype),
        of_b.to(pair.B.dtype),
        of_decay.to(pair.log_decay.dtype).contiguous(),
        of_steps.transpose(1, 2).to(pair.dt.dtype).contiguous(),
        empty if pair.D is None else on_diagonal.double().sum((0, 2)).to(pair.D.dtype),
    )


def _run_rows(
    pair: SSDPair, teacher_lse: Tensor, steps: Tensor, upstream: Tensor, values: Tensor, *, write_slopes: bool
) -> Tensor:
    """Run `ssd_rows`: fill `values`, or return C's gradient without the diagonal in float32."""
    cut = blocks("row slopes" if write_slopes else "values", *pair.by_width)
    batch, time, groups, _ = pair.C.shape
    heads = pair.dt.shape[2]
    programs = triton.cdiv(time, cut.rows) * batch * groups
    shares = parts(programs, heads // groups)
    slopes = _slopes(pair, shares if write_slopes else 0)
    ssd_rows[(programs * shares,)](
        pair.C, pair.B, pair.sums(), steps, *pair.teacher_arguments(teacher_lse), upstream, values, slopes,
        *pair.numbers(), *slopes.stride()[:4], steps.numel(), heads // groups // shares,
        **pair.constants(), WRITE_SLOPES=write_slopes, **launch(cut),
    )  # fmt: skip
    return slopes.sum(0)


def _run_columns(pair: SSDPair, teacher_lse: Tensor, steps: Tensor, upstream: Tensor, below: Tensor) -> Tensor:
    """Run `ssd_columns`: add dt's gradient to `below` and return B's in float32, both without the diagonal."""
    cut = blocks("column slopes", *pair.by_width)
    batch, time, groups, _ = pair.C.shape
    heads = pair.dt.shape[2]
    programs = triton.cdiv(time, cut.columns) * batch * groups
    shares = parts(programs, heads // groups)
    slopes = _slopes(pair, shares)
    ssd_columns[(programs * shares,)](
        pair.C, pair.B, pair.sums(), steps, *pair.teacher_arguments(teacher_lse), upstream, below, slopes,
        *pair.numbers(), *slopes.stride()[:4], steps.numel(), heads // groups // shares,
        **pair.constants(), **launch(cut),
    )  # fmt: skip
    return slopes.sum(0)


def _slopes(pair: SSDPair, shares: int) -> Tensor:
    return torch.empty(shares, *pair.C.shape, dtype=torch.float32, device=pair.C.device)


def _teacher_diagonal(pair: SSDPair, teacher_lse: Tensor) -> Tensor:
    cut = blocks("values", *pair.by_width)
    batch, time, heads = pair.dt.shape
    values = torch.empty(batch, heads, time, dtype=torch.float32, device=pair.C.device)
    strides = [stride for tensor in (pair.teacher_query, pair.teacher_key) for stride in tensor.stride()[:3]]
    width, teachers = pair.teacher_query.shape[3], (pair.teacher_query.shape[2], pair.teacher_key.shape[2])
    teacher_diagonal[(triton.cdiv(time, cut.rows) * batch * heads,)](
        *pair.teacher_arguments(teacher_lse), values, *strides, time, heads, *teachers, pair.scale, pair.cap,
        WIDTH_T=width, PADDED_T=padded(width), CAPPED_T=pair.cap > 0, MAPPED=pair.mapped,
        BM=cut.rows, num_warps=cut.warps,
    )  # fmt: skip
    return values
