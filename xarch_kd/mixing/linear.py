"""Mixing of linear attention: without decay, with one per head or per key channel; normalized or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xarch_kd.mixing.checks import (
    check_decay,
    check_divides,
    check_factors,
    check_rank,
    check_scale,
    check_shape,
    check_sign,
    check_valid_range,
)
from xarch_kd.mixing.decay import (
    TILE,
    causal_pairs,
    decayed_entries,
    grouped_product,
    running_sum,
    scalar_pairs,
    spread,
)
from xarch_kd.mixing.query_key import QueryKeyMixing
from xarch_kd.mixing.scan import chunk_size, scan


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LinearMixing(QueryKeyMixing):
    """M_ij = scale Σ_n query_in key_jn exp(Σ_{j<k<=i} log_decay_kn) for j <= i (GLA, arXiv:2312.06635).

    query [batch, time, heads, dim], key [batch, time, key heads, dim] (head h has key head h // (heads / key
    heads)), as used by the mixer, feature maps applied. log_decay (natural log, at most 0) is None, [batch, time,
    heads], or [batch, time, heads, dim] with one decay per key channel. `normalized` divides each row by its sum; a row
    whose sum is 0 is 0.

    Raises UsageError for factors that do not fit each other, and (on a CPU) for a positive log decay.
    """

    kind: ClassVar[str] = "linear"

    scale: float = 1.0
    log_decay: Tensor | None = None
    normalized: bool = False

    def __post_init__(self) -> None:
        check_rank(self.kind, "query", self.query, "batch, time, heads, dim")
        check_rank(self.kind, "key", self.key, "batch, time, key heads, dim")
        sizes = (self.batch, self.time, self.heads)
        check_factors(self.kind, self.factors, sizes)
        key_heads = self.key.shape[2]
        expected = (*sizes[:2], key_heads, self.query.shape[3])
        check_shape(self.kind, "key", self.key, "batch, time, key heads, dim", expected)
        check_divides(self.kind, key_heads, self.heads, "key heads")
        if self.log_decay is not None:
            check_decay(self.kind, self.log_decay, tuple(self.query.shape))
        check_scale(self.kind, self.scale)
        check_valid_range(self.kind, self.valid_range, self.batch, self.time, self.device)
        if self.log_decay is not None:
            check_sign(self.kind, "log_decay", self._zero_invalid(self.log_decay), negative=True)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by field name."""
        named = {"query": self.query, "key": self.key, "log_decay": self.log_decay}
        return {name: factor for name, factor in named.items() if factor is not None}

    def _apply(self, values: Tensor) -> Tensor:
        if not self.normalized:
            return self._plain_apply(values)
        result = self._plain_apply(torch.cat([values, torch.ones_like(values[..., :1])], -1))
        return result[..., :-1] / _divisor(result[..., -1:])

    def _plain_apply(self, values: Tensor) -> Tensor:
        """Return the unnormalized rows applied to values."""
        dtype = torch.promote_types(self.dtype, values.dtype)
        query, key = (self._zero_invalid(factor).to(dtype).transpose(1, 2) for factor in (self.query, self.key))
        if self.log_decay is None:
            log_decay = query.new_zeros(self.batch, self.heads, self.time)
        else:
            log_decay = self._zero_invalid(self.log_decay).transpose(1, 2)
        size = TILE if log_decay.dim() == 4 else chunk_size(query.shape[-1] * values.shape[-1])
        inputs = values.to(dtype).transpose(1, 2)
        return scan(query * self.scale, key, log_decay, inputs, size=size).transpose(1, 2)

    def _block(self, rows: slice, columns: slice) -> Tensor:
        entries = self._plain_block(rows, columns)
        if not self.normalized:
            return entries
        if columns.start == 0 and columns.stop >= rows.stop:
            return entries / _divisor(entries.sum(-1, keepdim=True))
        ones = torch.ones(self.batch, self.time, self.heads, 1, dtype=self.dtype, device=self.device)
        return entries / _divisor(self._plain_apply(ones)[:, rows].transpose(1, 2))

    def _plain_block(self, rows: slice, columns: slice) -> Tensor:
        query = self._zero_invalid(self.query)[:, rows].to(self.dtype).transpose(1, 2) * self.scale
        key = self._zero_invalid(self.key)[:, columns].to(self.dtype).transpose(1, 2)
        causal = causal_pairs(rows, columns, self.device)
        if self.log_decay is None:
            return grouped_product(query, key, self.heads).masked_fill(~causal, 0)
        sums = running_sum(self._zero_invalid(self.log_decay), 1).transpose(1, 2)
        if self.log_decay.dim() == 3:
            return scalar_pairs(query, key, sums[:, :, rows, None], sums[:, :, columns, None], causal)
        return decayed_entries(query, spread(key, self.heads), sums[:, :, rows], sums[:, :, columns], rows, columns)


def _divisor(sums: Tensor) -> Tensor:
    """Return row sums to divide by; rows whose sum is 0 give 0."""
    return sums.masked_fill(sums == 0, float("inf"))
