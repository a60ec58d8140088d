"""Row blocks of softmax attention, and the gradients of its factors from a block's gradient."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from xarch_kd.mixing import SoftmaxMixing

# Logit of what is not visible: exp of it is 0, and differences of two are finite, so a row that sees nothing has values
# without meaning but never NaN.
UNSEEN: Final = -1e30


class SoftmaxRows:
    """Blocks [batch, heads, rows, columns] of a softmax mixing, and the sums of its factors' gradients over blocks.

    Rows that do not count hold numbers without meaning: their weight must be 0.
    """

    def __init__(self, mixing: SoftmaxMixing, dtype: torch.dtype, wanted: frozenset[str] = frozenset()) -> None:
        self.mixing = mixing
        query, key = (_clean(mixing, factor.detach()).to(dtype) for factor in (mixing.query, mixing.key))
        self.groups = key.shape[2]
        # [batch, key heads, heads that share one, time, dim] and [batch, key heads, time, dim].
        self.query = query.unflatten(2, (self.groups, -1)).permute(0, 2, 3, 1, 4) * mixing.scale
        self.key = key.transpose(1, 2).contiguous()
        self.sinks = None if mixing.sinks is None else mixing.sinks.detach().to(dtype)
        valid_indices = {"query": mixing.query, "key": self.key.transpose(-1, -2), "sinks": mixing.sinks}
        self.gradients = {
            name: torch.zeros(factor.shape, dtype=dtype, device=factor.device)
            for name, factor in valid_indices.items()
            if factor is not None and name in wanted
        }
        self._cap_slope: Tensor | None = None
        self._sink_entries: Tensor | None = None

    def columns(self, rows: slice) -> slice:
        """Return the columns that any of the rows may see."""
        first = 0 if self.mixing.window is None else max(0, rows.start - self.mixing.window + 1)
        return slice(first, rows.stop if self.mixing.causal else self.mixing.time)

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """Return the logits of a block, `UNSEEN` where a column is not visible."""
        query = self._query(rows)
        logits = (query @ self.key[:, :, columns].transpose(-1, -2)).unflatten(2, (-1, rows.stop - rows.start))
        logits = logits.flatten(1, 2)
        if self.mixing.softcap is not None:
            logits.div_(self.mixing.softcap).tanh_()
            self._cap_slope = 1 - logits.square() if self.gradients else None
            logits.mul_(self.mixing.softcap)
        self._hide(logits, rows, columns)
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the entries of a block from the logits of all that its rows see."""
        if self.sinks is None:
            return torch.softmax(logits, -1)
        normalizer = self._with_sinks(logits)
        self._sink_entries = torch.exp(self.sinks[:, None] - normalizer) if self.gradients else None
        return torch.exp(logits - normalizer[..., None])

    def log_normalizer(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Return log of the sum of each row's exponentials, so that log P = logits - it."""
        if self.sinks is not None:
            return self._with_sinks(logits)
        # The largest logit and the largest entry belong together, and the entry is at least 1 / columns.
        return logits.amax(-1) - probabilities.amax(-1).log()

    def matrix(self, rows: slice, columns: slice) -> Tensor:
        """Return the entries of a block whose columns are all that its rows see."""
        return self.probabilities(self.logits(rows, columns))

    def backward(self, slope: Tensor, matrix: Tensor, weight: Tensor, rows: slice, columns: slice) -> None:
        """Add the gradients from weight[..., None] × slope, the gradient of the entries `matrix`; it is overwritten."""
        inner = (slope * matrix).sum(-1)
        self.logits_backward(slope.sub_(inner[..., None]).mul_(matrix), -inner, weight, rows, columns)

    def logits_backward(self, slope: Tensor, sink: Tensor, weight: Tensor, rows: slice, columns: slice) -> None:
        """Add the gradients from weight[..., None] × slope, the gradient of the logits; it is overwritten.

        `sink` [batch, heads, rows] times the sink's own entry is the gradient of its logit, before the weight.
        """
        if "sinks" in self.gradients:
            assert self._sink_entries is not None
            self.gradients["sinks"] += (sink * self._sink_entries * weight).sum((0, 2))
        if self._cap_slope is not None:
            slope.mul_(self._cap_slope)
        batch, _, count, width = slope.shape
        slope = slope.view(batch, self.groups, -1, width)
        weight = weight.reshape(batch, self.groups, -1, 1)
        if "query" in self.gradients:
            part = (slope @ self.key[:, :, columns]) * (weight * self.mixing.scale)
            # [batch, key heads, shared, rows, dim] -> [batch, rows, heads, dim]
            part = part.unflatten(2, (-1, count)).permute(0, 3, 1, 2, 4).flatten(2, 3)
            self.gradients["query"][:, rows] += part
        if "key" in self.gradients:
            # Kept as [batch, key heads, dim, time]: the product with the short side first is the faster one.
            self.gradients["key"][..., columns] += (self._query(rows) * weight).transpose(-1, -2) @ slope

    def finish(self) -> dict[str, Tensor]:
        """Return the gradients by the factors' names, in the layout of the factors."""
        return {name: sums.permute(0, 3, 1, 2) if name == "key" else sums for name, sums in self.gradients.items()}

    def _query(self, rows: slice) -> Tensor:
        return self.query[:, :, :, rows].flatten(2, 3)

    def _with_sinks(self, logits: Tensor) -> Tensor:
        assert self.sinks is not None
        return torch.logaddexp(logits.logsumexp(-1), self.sinks[:, None])

    def _hide(self, logits: Tensor, rows: slice, columns: slice) -> None:
        mixing = self.mixing
        plain = mixing.causal and mixing.window is None and mixing.valid_range is None
        # Without windows and starts all columns left of the block's first row are visible.
        seen_by_all = min(rows.start, columns.stop) - columns.start if plain else 0
        row = torch.arange(rows.start, rows.stop, device=logits.device)[:, None]
        column = torch.arange(columns.start + seen_by_all, columns.stop, device=logits.device)
        hidden = (column > row) if mixing.causal else torch.zeros_like(row + column, dtype=torch.bool)
        if mixing.window is not None:
            hidden = hidden | (row - column >= mixing.window)
        if mixing.valid_range is not None:
            start, stop = mixing.valid_range[:, :, None, None, None].unbind(1)
            hidden = hidden | (column < start) | (column >= stop)
        logits[..., seen_by_all:].masked_fill_(hidden, UNSEEN)


def _clean(mixing: SoftmaxMixing, factor: Tensor) -> Tensor:
    """Return the factor with 0 at tokens that do not count, which may hold anything."""
    if mixing.valid_range is None:
        return factor
    return factor.masked_fill(~mixing.valid_mask()[:, :, None, None], 0)
