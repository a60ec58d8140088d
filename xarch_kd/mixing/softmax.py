"""Mixing of softmax attention: causal or not, windowed, capped, with sinks, with grouped heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.mixing.base import Mixing
from xarch_kd.mixing.checks import check_bounds, check_divides, check_factors, check_rank, check_shape
from xarch_kd.mixing.decay import grouped_product


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftmaxMixing(Mixing):
    """M_ij = softmax over visible j of z_ij, z = scale query_i·key_j, capped to softcap·tanh(z / softcap).

    query [batch, time, heads, width], key [batch, time, key heads, width]: head h has key head h // (heads / key
    heads). Token j is visible to i when it counts, j <= i (if causal) and i − j < window (if windowed). `sinks` [heads]
    are logits of one more column that is dropped after the softmax: rows then sum to less than 1.

    Raises UsageError for factors that do not fit each other, a window below 1 and a softcap of at most 0.
    """

    kind: ClassVar[str] = "softmax"

    query: Tensor
    key: Tensor
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        check_rank(self.kind, "query", self.query, "batch, time, heads, width")
        check_rank(self.kind, "key", self.key, "batch, time, key heads, width")
        sizes = (self.batch, self.time, self.heads)
        check_factors(self.kind, self.factors, sizes)
        key_heads = self.key.shape[2]
        expected = (*sizes[:2], key_heads, self.query.shape[3])
        check_shape(self.kind, "key", self.key, "batch, time, key heads, width", expected)
        check_divides(self.kind, key_heads, self.heads, "key heads")
        if self.sinks is not None:
            check_shape(self.kind, "sinks", self.sinks, "heads", sizes[2:])
        if self.window is not None and self.window < 1:
            raise UsageError("A window holds at least the token itself.", asked=self.window, allowed=">= 1")
        if self.softcap is not None and not self.softcap > 0:
            raise UsageError("A softcap is above 0.", asked=self.softcap, allowed="> 0, or None for no cap")
        check_bounds(self.kind, self.start, self.stop, self.batch, self.time, self.device)

    @property
    def batch(self) -> int:
        """How many sequences."""
        return self.query.shape[0]

    @property
    def time(self) -> int:
        """How many tokens a sequence has."""
        return self.query.shape[1]

    @property
    def heads(self) -> int:
        """How many query heads."""
        return self.query.shape[2]

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by field name."""
        named = {"query": self.query, "key": self.key, "sinks": self.sinks}
        return {name: factor for name, factor in named.items() if factor is not None}

    def visible(self, rows: slice, columns: slice) -> Tensor:
        """Return which entries are part of a softmax, bool [batch or 1, 1, rows, columns]."""
        row = torch.arange(rows.start, rows.stop, device=self.device)[:, None]
        column = torch.arange(columns.start, columns.stop, device=self.device)
        seen = column <= row if self.causal else torch.ones_like(column <= row)
        if self.window is not None:
            seen = seen & (row - column < self.window)
        if self.start is None and self.stop is None:
            return seen[None, None]
        counted = self.counted()
        return seen & counted[:, None, rows, None] & counted[:, None, None, columns]

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """Return z [batch, heads, rows, columns], capped; −∞ where a token is not visible."""
        query = self._kept(self.query)[:, rows].to(self.dtype).transpose(1, 2)
        key = self._kept(self.key)[:, columns].to(self.dtype).transpose(1, 2)
        logits = grouped_product(query * self.scale, key, self.heads)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.masked_fill(~self.visible(rows, columns), float("-inf"))

    def log_normaliser(self, rows: slice) -> Tensor:
        """Return log Σ_j exp(z_ij), sinks included, [batch, heads, rows]; +∞ for rows that see no token and no sink.

        With it M_ij = exp(z_ij − log_normaliser_i) holds for every row, and is 0 where nothing is visible.
        """
        logits = self.logits(rows, self._seen_columns(rows))
        dead = (logits == float("-inf")).all(-1, keepdim=True)
        if self.sinks is not None:
            sink = self.sinks.to(self.dtype)[:, None, None].expand(self.batch, -1, logits.shape[2], 1)
            logits = torch.cat([logits, sink], -1)
        total = torch.logsumexp(logits.masked_fill(dead, 0), -1)
        return total.masked_fill(dead.squeeze(-1), float("inf"))

    def _seen_columns(self, rows: slice) -> slice:
        """Return the columns that any of these rows may see."""
        first = 0 if self.window is None else max(0, rows.start - self.window + 1)
        return slice(first, rows.stop if self.causal else self.time)

    def _apply(self, values: Tensor) -> Tensor:
        return self._by_rows(values)

    def _block(self, rows: slice, columns: slice) -> Tensor:
        return (self.logits(rows, columns) - self.log_normaliser(rows)[..., None]).exp()
