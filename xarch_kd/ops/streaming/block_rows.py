"""Row blocks of any mixing, through its own `block`, and the gradients of its factors by autograd on one block."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.mixing import Mixing, SoftmaxMixing


class BlockRows:
    """Blocks [batch, heads, rows, columns] of a mixing, and the sums of its factors' gradients over blocks.

    Only the graph of one block is alive at a time: memory grows with the tokens, not with their square, as long as
    `block` itself needs no more than its rows.
    """

    def __init__(self, mixing: Mixing, dtype: torch.dtype, wanted: frozenset[str] = frozenset()) -> None:
        self.dtype = dtype
        self.causal = not isinstance(mixing, SoftmaxMixing) or mixing.causal
        leaves = {name: factor.detach().requires_grad_(name in wanted) for name, factor in mixing.factors.items()}
        named = iter(list(leaves.values()))
        self.mixing = mixing.map_factors(lambda _: next(named))
        self.leaves = {name: leaf for name, leaf in leaves.items() if name in wanted}
        self.gradients = {name: torch.zeros_like(leaf, dtype=dtype) for name, leaf in self.leaves.items()}
        self._entries: Tensor | None = None

    def columns(self, rows: slice) -> slice:
        """Return the columns that any of the rows may see."""
        return slice(0, rows.stop if self.causal else self.mixing.time)

    def matrix(self, rows: slice, columns: slice) -> Tensor:
        """Return the entries of a block."""
        with torch.set_grad_enabled(bool(self.leaves)):
            entries = self.mixing.block(rows, columns).to(self.dtype)
        self._entries = entries if self.leaves else None
        # Whoever gets them may write over them; the graph needs its own.
        return entries.detach().clone() if self.leaves else entries

    def backward(self, slope: Tensor, matrix: Tensor, weight: Tensor, rows: slice, columns: slice) -> None:
        """Add the gradients from weight[..., None] × slope, the gradient of the block's entries; it is overwritten."""
        entries, self._entries = self._entries, None
        assert entries is not None
        names, leaves = zip(*self.leaves.items(), strict=True)
        parts = torch.autograd.grad(entries, leaves, slope.mul_(weight[..., None]), allow_unused=True)
        for name, part in zip(names, parts, strict=True):
            if part is not None:
                self.gradients[name] += part

    def finish(self) -> dict[str, Tensor]:
        """Return the gradients by the factors' names."""
        return self.gradients
