"""Softmax of blocks of rows, applied to values, with gradients computed anew block by block: no map is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.mixing.decay import grouped_product, spread

# Entries of a block of rows, all sequences and heads.
BLOCK_ELEMENTS: Final = {"cpu": 1 << 21, "other": 1 << 26}
SMALLEST_BLOCK: Final = 16
SMALLEST_WINDOW: Final = 64


class RowSoftmax(NamedTuple):
    """Σ_j M_ij v_j [batch, heads, rows, dim] where values were given, and log Σ_j exp(z_ij) [batch, heads, rows]."""

    values: Tensor
    log_normaliser: Tensor


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Logits and visibility of softmax attention for rows from `first` on, among `time` columns (see SoftmaxMixing).

    `counted` [batch, time] bool says which tokens count; None means all.
    """

    first: int
    time: int
    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    counted: Tensor | None

    def visible(self, rows: slice, columns: slice, device: torch.device) -> Tensor:
        """Return which entries are part of a softmax, bool [batch or 1, 1, rows, columns]."""
        here = slice(self.first + rows.start, self.first + rows.stop)
        row = torch.arange(here.start, here.stop, device=device)[:, None]
        column = torch.arange(columns.start, columns.stop, device=device)
        seen = column <= row if self.causal else torch.ones_like(column <= row)
        if self.window is not None:
            seen = seen & (row - column < self.window)
        if self.counted is None:
            return seen[None, None]
        return seen & self.counted[:, None, here, None] & self.counted[:, None, None, columns]

    def reach(self, rows: slice) -> slice:
        """Return the columns that any of these rows may see."""
        start = 0 if self.window is None else max(0, self.first + rows.start - self.window + 1)
        return slice(start, self.first + rows.stop if self.causal else self.time)

    def blocks(self, rows: int, maps: int, device: torch.device) -> list[slice]:
        """Return rows cut into blocks of about BLOCK_ELEMENTS entries in `maps` maps."""
        budget = BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "other"] // maps
        size = max(SMALLEST_BLOCK, budget // self.time)
        if self.causal and self.window is not None:
            # As many rows as the window has columns: at most twice the entries that are needed.
            window = max(self.window, SMALLEST_WINDOW)
            size = max(size, min(window, budget // (2 * window)))
            size = min(size, window)
        return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]


def row_softmax(query: Tensor, key: Tensor, values: Tensor, sinks: Tensor | None, pattern: Pattern) -> RowSoftmax:
    """Return the softmax of rows [batch, heads, rows, dim] over keys [batch, key heads, time, dim].

    It is applied to values [batch, heads, time, value dim], of dimension 0 if only the normalizer is needed. Rows that
    see nothing have values 0 and a log normaliser of +∞. `sinks` [heads] are logits of a dropped column.
    """
    result, log_normaliser = _RowSoftmax.apply(query, key, values, sinks, pattern)
    return RowSoftmax(result, log_normaliser)


class _RowSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, values: Tensor, sinks: Tensor | None, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        batch, heads, rows, _ = query.shape
        result, normalizer = query.new_empty(batch, heads, rows, values.shape[-1]), query.new_empty(batch, heads, rows)
        for block in pattern.blocks(rows, batch * heads, query.device):
            columns = pattern.reach(block)
            logits, _ = _logits(query[:, :, block], key[:, :, columns], pattern, block, columns)
            normalizer[:, :, block] = _log_normaliser(logits, sinks)
            if values.shape[-1]:
                result[:, :, block] = logits.sub_(normalizer[:, :, block, None]).exp_() @ values[:, :, columns]
        ctx.save_for_backward(query, key, values, sinks, normalizer)
        ctx.pattern = pattern
        return result, normalizer

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd enables gradients here only to differentiate once more (create_graph=True).
        if torch.is_grad_enabled():
            raise UsageError(
                "Softmax by blocks of rows has no second derivative.",
                asked="create_graph=True",
                fix="differentiate twice through torch.softmax of logits(rows, columns)",
            )
        query, key, values, sinks, normalizer = ctx.saved_tensors
        into = _Gradients(*(torch.zeros_like(tensor) for tensor in (query, key, values, normalizer)))
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            for block in ctx.pattern.blocks(query.shape[2], query.shape[0] * query.shape[1], query.device):
                of_rows = (query[:, :, block], normalizer[:, :, block], *(part[:, :, block] for part in upstream))
                _add_gradients(into, _Rows(*of_rows), key, values, ctx.pattern, block)
            of_sinks = None
            if sinks is not None:
                # A dropped column has no values of its own: its gradient is its weight times the rows' common part.
                of_sinks = ((sinks[:, None] - normalizer).exp() * into.common).sum((0, 2)).to(sinks.dtype)
        return into.query, into.key, into.values, of_sinks, None


class _Gradients(NamedTuple):
    """Sums of gradients, and per row dL/d log normaliser − Σ_j M_ij dL/dM_ij, which all logits of a row share."""

    query: Tensor
    key: Tensor
    values: Tensor
    common: Tensor


class _Rows(NamedTuple):
    """What is given for a block of rows: its queries, normalisers and the gradients of both results."""

    query: Tensor
    normalizer: Tensor
    of_values: Tensor
    of_normaliser: Tensor


def _add_gradients(into: _Gradients, rows: _Rows, key: Tensor, values: Tensor, pattern: Pattern, block: slice) -> None:
    """Add a block's part: dL/dz = M ∘ (dL/dM − Σ_j M dL/dM + dL/d log normaliser)."""
    columns = pattern.reach(block)
    logits, slope = _logits(rows.query, key[:, :, columns], pattern, block, columns)
    weights = logits.sub_(rows.normalizer[..., None]).exp_()
    common = rows.of_normaliser
    if values.shape[-1]:
        outer = rows.of_values @ values[:, :, columns].transpose(-1, -2)
        into.values[:, :, columns] += weights.transpose(-1, -2) @ rows.of_values
        common = common - (weights * outer).sum(-1)
        gradient = weights.mul_(outer.add_(common[..., None]))
    else:
        gradient = weights.mul_(common[..., None])
    into.common[:, :, block] = common
    if slope is not None:
        gradient.mul_(slope)
    gradient.mul_(pattern.scale)
    into.query[:, :, block] = gradient @ spread(key[:, :, columns], rows.query.shape[1])
    of_key = gradient.transpose(-1, -2) @ rows.query
    into.key[:, :, columns] += of_key.unflatten(1, (key.shape[1], -1)).sum(2)


def _logits(query: Tensor, key: Tensor, pattern: Pattern, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
    """Return masked logits, and the slope 1 − tanh² of the cap where there is one."""
    logits = grouped_product(query * pattern.scale, key, query.shape[1])
    slope = None
    if pattern.softcap is not None:
        bent = torch.tanh(logits / pattern.softcap)
        logits, slope = pattern.softcap * bent, 1 - bent.square()
    return logits.masked_fill(~pattern.visible(rows, columns, query.device), float("-inf")), slope


def _log_normaliser(logits: Tensor, sinks: Tensor | None) -> Tensor:
    total = torch.logsumexp(logits, -1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(logits.dtype)[:, None])
    return total.masked_fill(total == float("-inf"), float("inf"))
