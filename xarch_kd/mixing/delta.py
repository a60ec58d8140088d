"""Mixing of the gated delta rule, with one decay per head or per key channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xarch_kd.mixing.checks import (
    check_decay,
    check_factors,
    check_rank,
    check_scale,
    check_shape,
    check_sign,
    check_valid_range,
)
from xarch_kd.mixing.decay import TILE
from xarch_kd.mixing.delta_rule import delta_rows, delta_segment
from xarch_kd.mixing.query_key import QueryKeyMixing
from xarch_kd.mixing.scan import CHUNK, in_segments


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DeltaMixing(QueryKeyMixing):
    """M of S_t = (I − beta_t k_t k_tᵀ) e^{g_t} S_{t−1} + beta_t k_t v_tᵀ, o_t = scale S_tᵀ q_t (arXiv:2412.06464).

    query and key [batch, time, heads, dim] as used by the mixer (L2-normalized if it does so), beta [batch, time,
    heads], log_decay g (natural log, at most 0) None, [batch, time, heads] or [batch, time, heads, dim]: one per
    key channel, where e^{g} scales the rows of S before the delta step (Kimi delta attention, arXiv:2510.26692).

    Raises UsageError for factors that do not fit each other, and (on a CPU) for a positive log decay.
    """

    kind: ClassVar[str] = "delta"

    beta: Tensor
    log_decay: Tensor | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_rank(self.kind, "query", self.query, "batch, time, heads, dim")
        sizes = (self.batch, self.time, self.heads)
        check_factors(self.kind, self.factors, sizes)
        check_shape(self.kind, "key", self.key, "batch, time, heads, dim", tuple(self.query.shape))
        check_shape(self.kind, "beta", self.beta, "batch, time, heads", sizes)
        if self.log_decay is not None:
            check_decay(self.kind, self.log_decay, tuple(self.query.shape))
        check_scale(self.kind, self.scale)
        check_valid_range(self.kind, self.valid_range, self.batch, self.time, self.device)
        if self.log_decay is not None:
            check_sign(self.kind, "log_decay", self._zero_invalid(self.log_decay), negative=True)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by field name."""
        named = {"query": self.query, "key": self.key, "beta": self.beta, "log_decay": self.log_decay}
        return {name: factor for name, factor in named.items() if factor is not None}

    def _apply(self, values: Tensor) -> Tensor:
        dtype = torch.promote_types(self.dtype, values.dtype)
        factors = (*self._head_first(dtype), values.to(dtype).transpose(1, 2))
        size, per_pair = (CHUNK, 1) if factors[3].dim() == 3 else (TILE, self.query.shape[-1])
        state = values.new_zeros(self.batch, self.heads, self.query.shape[-1], values.shape[-1], dtype=dtype)
        return in_segments(delta_segment, factors, state, size=size, per_pair=per_pair).transpose(1, 2)

    def _block(self, rows: slice, columns: slice) -> Tensor:
        factors = self._head_first(self.dtype)
        return delta_rows(*factors, rows, columns, size=CHUNK if factors[3].dim() == 3 else TILE)

    def _head_first(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return query (scaled), key, beta and log decay as [batch, heads, time, ...], 0 where tokens are not valid."""
        query, key, beta = (self._zero_invalid(factor).transpose(1, 2) for factor in (self.query, self.key, self.beta))
        log_decay = (
            torch.zeros_like(beta) if self.log_decay is None else self._zero_invalid(self.log_decay).transpose(1, 2)
        )
        return query.to(dtype) * self.scale, key.to(dtype), beta.to(dtype), log_decay
