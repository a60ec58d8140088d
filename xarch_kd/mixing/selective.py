"""Mixing of Mamba-1's selective scan: one matrix per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xarch_kd.mixing.base import Mixing
from xarch_kd.mixing.checks import check_divides, check_factors, check_rank, check_shape, check_sign, check_valid_range
from xarch_kd.mixing.decay import TILE, decayed_entries, same_pairs, spread
from xarch_kd.mixing.scan import scan


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SelectiveMixing(Mixing):
    """M_ij = Σ_n C_in B_jn exp(A_n Σ_{j<k<=i} dt_k) dt_j + D δ_ij per channel, j <= i (Mamba, arXiv:2312.00752, 2).

    C and B [batch, time, state] (or [batch, time, groups, state], channel c having group c // (channels / groups)),
    dt [batch, time, channels] (at least 0), A [channels, state] (at most 0), D [channels] or None. Heads are channels.

    Raises UsageError for factors that do not fit each other, and (on a CPU) for a negative dt or positive A.
    """

    kind: ClassVar[str] = "selective"

    C: Tensor
    B: Tensor
    dt: Tensor
    A: Tensor
    D: Tensor | None = None

    def __post_init__(self) -> None:
        check_rank(self.kind, "C", self.C, "batch, time, state", "batch, time, groups, state")
        check_rank(self.kind, "dt", self.dt, "batch, time, channels")
        sizes = (self.batch, self.time, self.heads)
        check_factors(self.kind, self.factors, sizes)
        axes = "batch, time, state" if self.C.dim() == 3 else "batch, time, groups, state"
        check_shape(self.kind, "C", self.C, axes, (*sizes[:2], *self.C.shape[2:]))
        check_shape(self.kind, "B", self.B, axes, tuple(self.C.shape))
        check_shape(self.kind, "A", self.A, "channels, state", (self.heads, self.C.shape[-1]))
        if self.D is not None:
            check_shape(self.kind, "D", self.D, "channels", sizes[2:])
        if self.C.dim() == 4:
            check_divides(self.kind, self.C.shape[2], self.heads, "groups")
        check_valid_range(self.kind, self.valid_range, self.batch, self.time, self.device)
        check_sign(self.kind, "dt", self._zero_invalid(self.dt), negative=False)
        check_sign(self.kind, "A", self.A, negative=True)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.dt.shape[0]

    @property
    def time(self) -> int:
        """Sequence length in tokens."""
        return self.dt.shape[1]

    @property
    def heads(self) -> int:
        """Number of channels."""
        return self.dt.shape[2]

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by field name."""
        named = {"C": self.C, "B": self.B, "dt": self.dt, "A": self.A, "D": self.D}
        return {name: factor for name, factor in named.items() if factor is not None}

    def _apply(self, values: Tensor) -> Tensor:
        dtype = torch.promote_types(self.dtype, values.dtype)
        values = values.to(dtype)
        left, right = self._grouped(self.C).to(dtype), self._grouped(self.B).to(dtype)
        dt = self._zero_invalid(self.dt).transpose(1, 2)
        inputs = values.transpose(1, 2) * dt.to(dtype)[..., None]
        result = scan(left, right, dt, inputs, size=TILE, rate=self.A).transpose(1, 2)
        return result if self.D is None else result + self.D.to(dtype)[:, None] * values

    def _block(self, rows: slice, columns: slice) -> Tensor:
        left = spread(self._grouped(self.C)[:, :, rows], self.heads)
        right = spread(self._grouped(self.B)[:, :, columns], self.heads)
        dt = self._zero_invalid(self.dt).transpose(1, 2)
        right = right * dt[..., columns].to(self.dtype)[..., None]
        elapsed = dt.double().cumsum(-1)[..., None]
        sums = elapsed[:, :, rows], elapsed[:, :, columns]
        entries = decayed_entries(left, right, *sums, rows, columns, rate=self.A.to(self.dtype))
        if self.D is None:
            return entries
        return entries + self.D.to(self.dtype)[:, None, None] * same_pairs(rows, columns, self.device)

    def _grouped(self, factor: Tensor) -> Tensor:
        """Return C or B as [batch, groups, time, state]."""
        factor = self._zero_invalid(factor).to(self.dtype)
        return factor[:, None] if factor.dim() == 3 else factor.transpose(1, 2)
