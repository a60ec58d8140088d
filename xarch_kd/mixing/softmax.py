"""Mixing of softmax attention: causal or not, with windows, softcap, sinks, grouped key heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from xarch_kd.errors import UsageError
from xarch_kd.mixing.checks import check_divides, check_factors, check_rank, check_scale, check_shape, check_valid_range
from xarch_kd.mixing.decay import grouped_product, spread
from xarch_kd.mixing.query_key import QueryKeyMixing
from xarch_kd.mixing.row_softmax import Pattern, row_softmax


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SoftmaxMixing(QueryKeyMixing):
    """M_ij = softmax over visible j of z_ij, z = scale query_i·key_j, capped to softcap·tanh(z / softcap).

    query [batch, time, heads, dim], key [batch, time, key heads, dim]: head h has key head h // (heads / key heads).
    Token j is visible to i if it is valid, j <= i (if causal) and i − j < window (if given). `sinks` [heads] are the
    logits of an extra column that is dropped after the softmax: rows then sum to less than 1.

    Raises UsageError for factors that do not fit each other, a window below 1, or a softcap that is not positive.
    """

    kind: ClassVar[str] = "softmax"

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        check_rank(self.kind, "query", self.query, "batch, time, heads, dim")
        check_rank(self.kind, "key", self.key, "batch, time, key heads, dim")
        sizes = (self.batch, self.time, self.heads)
        check_factors(self.kind, self.factors, sizes)
        key_heads = self.key.shape[2]
        expected = (*sizes[:2], key_heads, self.query.shape[3])
        check_shape(self.kind, "key", self.key, "batch, time, key heads, dim", expected)
        check_divides(self.kind, key_heads, self.heads, "key heads")
        if self.sinks is not None:
            check_shape(self.kind, "sinks", self.sinks, "heads", sizes[2:])
        if self.window is not None and self.window < 1:
            raise UsageError("A window must contain at least the token itself.", asked=self.window, allowed=">= 1")
        if self.softcap is not None and not self.softcap > 0:
            raise UsageError("A softcap must be positive.", asked=self.softcap, allowed="> 0, or None for no cap")
        check_scale(self.kind, self.scale)
        check_valid_range(self.kind, self.valid_range, self.batch, self.time, self.device)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by field name."""
        named = {"query": self.query, "key": self.key, "sinks": self.sinks}
        return {name: factor for name, factor in named.items() if factor is not None}

    def visible(self, rows: slice, columns: slice) -> Tensor:
        """Return the mask of visible entries, bool [batch or 1, 1, rows, columns]."""
        return self._pattern(rows).visible(slice(0, rows.stop - rows.start), columns, self.device)

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """Return z [batch, heads, rows, columns], capped; −∞ where a token is not visible."""
        query = self._zero_invalid(self.query)[:, rows].to(self.dtype).transpose(1, 2)
        key = self._zero_invalid(self.key)[:, columns].to(self.dtype).transpose(1, 2)
        logits = grouped_product(query * self.scale, key, self.heads)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.masked_fill(~self.visible(rows, columns), float("-inf"))

    def log_normalizer(self, rows: slice) -> Tensor:
        """Return log Σ_j exp(z_ij), sinks included, [batch, heads, rows]; +∞ for rows without a visible token or sink.

        M_ij = exp(z_ij − log_normalizer_i) then holds for every row, and is 0 if nothing is visible.
        """
        rows = self._bounds(rows)
        query, key = self._head_first(self.dtype)
        nothing = query.new_empty(self.batch, self.heads, self.time, 0)
        return row_softmax(query[:, :, rows], key, nothing, self.sinks, self._pattern(rows)).log_normalizer

    def _head_first(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return query and key [batch, heads, time, dim], 0 where tokens are not valid."""
        query, key = (self._zero_invalid(factor).to(dtype).transpose(1, 2) for factor in (self.query, self.key))
        return query, key

    def _pattern(self, rows: slice) -> Pattern:
        return Pattern(
            first=rows.start,
            time=self.time,
            scale=self.scale,
            softcap=self.softcap,
            causal=self.causal,
            window=self.window,
            valid=None if self.valid_range is None else self.valid_mask(),
        )

    def _apply(self, values: Tensor) -> Tensor:
        same = self.query.dtype == self.key.dtype == values.dtype
        dtype = values.dtype if same else torch.promote_types(self.dtype, values.dtype)
        if self._plain(dtype):
            return self._by_sdpa(values.to(dtype), dtype)
        dtype = torch.promote_types(self.dtype, values.dtype)
        query, key = self._head_first(dtype)
        values = values.to(dtype).transpose(1, 2)
        return row_softmax(query, key, values, self.sinks, self._pattern(slice(0, self.time))).values.transpose(1, 2)

    def _plain(self, dtype: torch.dtype) -> bool:
        """Return true if PyTorch's attention computes this without a mask or a time × time tensor."""
        windowed = self.window is not None and self.window < self.time
        # There is no GPU attention kernel for float64.
        fast = self.device.type == "cpu" or dtype != torch.float64
        extras = self.softcap is not None or self.sinks is not None
        return fast and not extras and not windowed and (self.causal or self.valid_range is None)

    def _by_sdpa(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        query, key = self._zero_invalid(self.query).to(dtype), self._zero_invalid(self.key).to(dtype)
        start = None if self.valid_range is None else self.valid_range[:, 0]
        if start is not None:
            # Tokens before the start are rolled to the end, where no valid token attends to them.
            query, key, values = (_rolled(tensor, start) for tensor in (query, key, values))
        key = spread(key.transpose(1, 2), self.heads)
        # Kernels need equal head dims, on GPUs a multiple of 8; otherwise PyTorch builds a time × time tensor.
        step = 1 if self.device.type == "cpu" else 8
        head_dim = -(-max(query.shape[-1], values.shape[-1]) // step) * step
        query, key, padded = (
            functional.pad(tensor, (0, head_dim - tensor.shape[-1]))
            for tensor in (query.transpose(1, 2), key, values.transpose(1, 2))
        )
        result = functional.scaled_dot_product_attention(query, key, padded, is_causal=self.causal, scale=self.scale)
        result = result[..., : values.shape[-1]].transpose(1, 2)
        return result if start is None else _rolled(result, -start)

    def _block(self, rows: slice, columns: slice) -> Tensor:
        return (self.logits(rows, columns) - self.log_normalizer(rows)[..., None]).exp()


def _rolled(tensor: Tensor, by: Tensor) -> Tensor:
    """Return tensor [batch, time, heads, dim] with token (t + by) mod time of each sequence at t."""
    time = tensor.shape[1]
    source = (torch.arange(time, device=tensor.device) + by[:, None]) % time
    return tensor.gather(1, source[:, :, None, None].expand_as(tensor))
