"""Mixing of a causal short convolution, gated or not: one banded matrix per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.mixing.base import Mixing
from xarch_kd.mixing.checks import check_factors, check_rank, check_shape, check_valid_range


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BandedMixing(Mixing):
    """M_ij = row_scale_i taps_{i−j} column_scale_j per channel for 0 <= i − j < kernel size, else 0.

    taps [channels, kernel size]: taps[c, m] multiplies the value m tokens back (the reverse order of a convolution's
    weight); row_scale and column_scale [batch, time, channels], one of which may be None. Heads are channels.

    Raises UsageError for factors that do not fit each other.
    """

    kind: ClassVar[str] = "banded"

    taps: Tensor
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None

    def __post_init__(self) -> None:
        check_rank(self.kind, "taps", self.taps, "channels, kernel size")
        scale = self._scale
        check_rank(self.kind, "row_scale or column_scale", scale, "batch, time, channels")
        sizes = (self.batch, self.time, self.heads)
        check_factors(self.kind, self.factors, sizes)
        if not self.taps.shape[1]:
            raise UsageError("A banded mixing needs at least one tap.", found=list(self.taps.shape))
        for name in ("row_scale", "column_scale"):
            if name in self.factors:
                check_shape(self.kind, name, self.factors[name], "batch, time, channels", sizes)
        check_valid_range(self.kind, self.valid_range, self.batch, self.time, self.device)

    @property
    def _scale(self) -> Tensor:
        scale = self.row_scale if self.row_scale is not None else self.column_scale
        if scale is None:
            raise UsageError(
                "The number of sequences and tokens of a banded mixing is undefined.",
                found="neither row_scale nor column_scale",
                fix="pass row_scale=torch.ones(1, 1, 1).expand(batch, time, channels) for an ungated convolution",
            )
        return scale

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self._scale.shape[0]

    @property
    def time(self) -> int:
        """Sequence length in tokens."""
        return self._scale.shape[1]

    @property
    def heads(self) -> int:
        """Number of channels."""
        return self.taps.shape[0]

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by field name."""
        named = {"taps": self.taps, "row_scale": self.row_scale, "column_scale": self.column_scale}
        return {name: factor for name, factor in named.items() if factor is not None}

    def _apply(self, values: Tensor) -> Tensor:
        dtype = torch.promote_types(self.dtype, values.dtype)
        values = values.to(dtype)
        if self.column_scale is not None:
            values = values * self._zero_invalid(self.column_scale).to(dtype)[..., None]
        taps = self.taps.to(dtype)
        result = values * taps[:, 0, None]
        for back in range(1, min(self.taps.shape[1], self.time)):
            shifted = values[:, :-back] * taps[:, back, None]
            result = result + torch.nn.functional.pad(shifted, (0, 0, 0, 0, back, 0))
        if self.row_scale is not None:
            result = result * self._zero_invalid(self.row_scale).to(dtype)[..., None]
        return result

    def _block(self, rows: slice, columns: slice) -> Tensor:
        kernel_size = self.taps.shape[1]
        row = torch.arange(rows.start, rows.stop, device=self.device)
        back = row[:, None] - torch.arange(columns.start, columns.stop, device=self.device)
        inside = (back >= 0) & (back < kernel_size)
        entries = self.taps.to(self.dtype)[:, back.clamp(0, kernel_size - 1)].masked_fill(~inside, 0)
        entries = entries.expand(self.batch, *entries.shape)
        if self.row_scale is not None:
            entries = entries * self._zero_invalid(self.row_scale)[:, rows].to(self.dtype).transpose(1, 2)[..., None]
        if self.column_scale is not None:
            scale = self._zero_invalid(self.column_scale)[:, columns].to(self.dtype)
            entries = entries * scale.transpose(1, 2)[..., None, :]
        return entries
