"""Mixing of a state-space model with a scalar decay per head: Mamba-2, and RG-LRU with one channel per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xarch_kd.mixing.base import Mixing
from xarch_kd.mixing.checks import check_divides, check_factors, check_rank, check_shape, check_sign, check_valid_range
from xarch_kd.mixing.decay import causal_pairs, running_sum, same_pairs, scalar_pairs
from xarch_kd.mixing.scan import chunk_size, scan


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SSDMixing(Mixing):
    """M_ij = exp(Σ_{j<k<=i} log_decay_k) (C_i·B_j) dt_j + D δ_ij for j <= i (Mamba-2, arXiv:2405.21060, eq. 2).

    C and B [batch, time, groups, state], log_decay [batch, time, heads] (dt·A of each step, natural log, at most 0),
    dt [batch, time, heads], D [heads] or None; head h has group h // (heads / groups). RG-LRU is this with one state
    and one group, its channels as heads and its input gate as dt.

    Raises UsageError for factors that do not fit each other, and (on a CPU) for a positive log decay.
    """

    kind: ClassVar[str] = "ssd"

    C: Tensor
    B: Tensor
    log_decay: Tensor
    dt: Tensor
    D: Tensor | None = None

    def __post_init__(self) -> None:
        check_rank(self.kind, "C", self.C, "batch, time, groups, state")
        check_rank(self.kind, "log_decay", self.log_decay, "batch, time, heads")
        sizes = (self.batch, self.time, self.heads)
        check_factors(self.kind, self.factors, sizes)
        check_shape(self.kind, "C", self.C, "batch, time, groups, state", (*sizes[:2], *self.C.shape[2:]))
        check_shape(self.kind, "B", self.B, "batch, time, groups, state", tuple(self.C.shape))
        check_shape(self.kind, "dt", self.dt, "batch, time, heads", sizes)
        if self.D is not None:
            check_shape(self.kind, "D", self.D, "heads", sizes[2:])
        check_divides(self.kind, self.C.shape[2], self.heads, "groups")
        check_valid_range(self.kind, self.valid_range, self.batch, self.time, self.device)
        check_sign(self.kind, "log_decay", self._zero_invalid(self.log_decay), negative=True)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.log_decay.shape[0]

    @property
    def time(self) -> int:
        """Sequence length in tokens."""
        return self.log_decay.shape[1]

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.log_decay.shape[2]

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by field name."""
        named = {"C": self.C, "B": self.B, "log_decay": self.log_decay, "dt": self.dt, "D": self.D}
        return {name: factor for name, factor in named.items() if factor is not None}

    def _apply(self, values: Tensor) -> Tensor:
        dtype = torch.promote_types(self.dtype, values.dtype)
        values = values.to(dtype)
        left, right, log_decay, dt = (
            self._zero_invalid(factor).transpose(1, 2) for factor in (self.C, self.B, self.log_decay, self.dt)
        )
        size = chunk_size(left.shape[-1] * values.shape[-1])
        inputs = values.transpose(1, 2) * dt.to(dtype)[..., None]
        result = scan(left.to(dtype), right.to(dtype), log_decay, inputs, size=size).transpose(1, 2)
        return result if self.D is None else result + self.D.to(dtype)[:, None] * values

    def _block(self, rows: slice, columns: slice) -> Tensor:
        left = self._zero_invalid(self.C)[:, rows].to(self.dtype).transpose(1, 2)
        right = self._zero_invalid(self.B)[:, columns].to(self.dtype).transpose(1, 2)
        sums = running_sum(self._zero_invalid(self.log_decay), 1).transpose(1, 2)[..., None]
        causal = causal_pairs(rows, columns, self.device)
        dt = self._zero_invalid(self.dt)[:, columns].to(self.dtype).transpose(1, 2)
        entries = scalar_pairs(left, right, sums[:, :, rows], sums[:, :, columns], causal) * dt[..., None, :]
        if self.D is None:
            return entries
        return entries + self.D.to(self.dtype)[:, None, None] * same_pairs(rows, columns, self.device)
