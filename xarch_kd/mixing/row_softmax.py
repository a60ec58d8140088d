"""Softmax attention by blocks of rows, recomputed in the backward pass: no time × time tensor is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.mixing.decay import grouped_product, spread

# Entries per block of rows, over all sequences and heads.
BLOCK_ELEMENTS: Final = {"cpu": 1 << 21, "other": 1 << 26}
SMALLEST_BLOCK: Final = 16
SMALLEST_WINDOW: Final = 64


class RowSoftmax(NamedTuple):
    """Σ_j M_ij v_j [batch, heads, rows, dim] and the log normalizer log Σ_j exp(z_ij) [batch, heads, rows]."""

    values: Tensor
    log_normalizer: Tensor


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Logits and visibility of softmax attention for rows from `first` on, among `time` columns (see SoftmaxMixing).

    `valid` [batch, time] bool is the mask of valid tokens; None: all are.
    """

    first: int
    time: int
    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    valid: Tensor | None

    def visible(self, rows: slice, columns: slice, device: torch.device) -> Tensor:
        """Return the mask of visible entries, bool [batch or 1, 1, rows, columns]."""
        here = slice(self.first + rows.start, self.first + rows.stop)
        row = torch.arange(here.start, here.stop, device=device)[:, None]
        column = torch.arange(columns.start, columns.stop, device=device)
        seen = column <= row if self.causal else torch.ones_like(column <= row)
        if self.window is not None:
            seen = seen & (row - column < self.window)
        if self.valid is None:
            return seen[None, None]
        return seen & self.valid[:, None, here, None] & self.valid[:, None, None, columns]

    def reach(self, rows: slice) -> slice:
        """Return the range of columns that are visible to any of these rows."""
        start = 0 if self.window is None else max(0, self.first + rows.start - self.window + 1)
        return slice(start, self.first + rows.stop if self.causal else self.time)

    def blocks(self, rows: int, maps: int, device: torch.device) -> list[slice]:
        """Return rows split into blocks of about BLOCK_ELEMENTS entries in `maps` matrices."""
        budget = BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "other"] // maps
        size = max(SMALLEST_BLOCK, budget // self.time)
        if self.causal and self.window is not None:
            # As many rows as the window has columns: at most twice the necessary entries.
            window = max(self.window, SMALLEST_WINDOW)
            size = max(size, min(window, budget // (2 * window)))
            size = min(size, window)
        return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]


def row_softmax(query: Tensor, key: Tensor, values: Tensor, sinks: Tensor | None, pattern: Pattern) -> RowSoftmax:
    """Return the softmax of rows [batch, heads, rows, dim] over keys [batch, key heads, time, dim].

    It is applied to values [batch, heads, time, value dim], of dimension 0 if only the normalizer is needed. Rows that
    see nothing have values 0 and a log normaliser of +∞. `sinks` [heads] are logits of a dropped column.
    """
    result, log_normalizer = _RowSoftmax.apply(query, key, values, sinks, pattern)
    return RowSoftmax(result, log_normalizer)


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
            normalizer[:, :, block] = _log_normalizer(logits, sinks)
            if values.shape[-1]:
                result[:, :, block] = logits.sub_(normalizer[:, :, block, None]).exp_() @ values[:, :, columns]
        ctx.save_for_backward(query, key, values, sinks, normalizer)
        ctx.pattern = pattern
        return result, normalizer

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd enables gradients here only for create_graph=True.
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
                # A sink column has no values: its gradient is its weight times the term shared by the row's logits.
                of_sinks = ((sinks[:, None] - normalizer).exp() * into.common).sum((0, 2)).to(sinks.dtype)
        return into.query, into.key, into.values, of_sinks, None


class _Gradients(NamedTuple):
    """Sums of gradients, and per row the term shared by its logits, dL/d log normalizer − Σ_j M_ij dL/dM_ij."""

    query: Tensor
    key: Tensor
    values: Tensor
    common: Tensor


class _Rows(NamedTuple):
    """Inputs of the backward pass for a block of rows: queries, log normalizers, gradients of both results."""

    query: Tensor
    normalizer: Tensor
    of_values: Tensor
    of_normalizer: Tensor


def _add_gradients(into: _Gradients, rows: _Rows, key: Tensor, values: Tensor, pattern: Pattern, block: slice) -> None:
    """Add the gradients of a block: dL/dz = M ∘ (dL/dM − Σ_j M dL/dM + dL/d log normalizer)."""
    columns = pattern.reach(block)
    logits, slope = _logits(rows.query, key[:, :, columns], pattern, block, columns)
    weights = logits.sub_(rows.normalizer[..., None]).exp_()
    common = rows.of_normalizer
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
    """Return masked logits, and the derivative 1 − tanh² of the softcap if there is one."""
    logits = grouped_product(query * pattern.scale, key, query.shape[1])
    slope = None
    if pattern.softcap is not None:
        bent = torch.tanh(logits / pattern.softcap)
        logits, slope = pattern.softcap * bent, 1 - bent.square()
    return logits.masked_fill(~pattern.visible(rows, columns, query.device), float("-inf")), slope


def _log_normalizer(logits: Tensor, sinks: Tensor | None) -> Tensor:
    total = torch.logsumexp(logits, -1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(logits.dtype)[:, None])
    return total.masked_fill(total == float("-inf"), float("inf"))
