"""HSIC_1 as sums over tokens that can be added up in any order: no Gram matrix of all tokens.

With x, y the features of a token less a fixed reference, X, Y those of all tokens and n their number (notation of
`reference.similarity`):

    tr(KL) = |XᵀY|² - Σ|x|²|y|²        1ᵀK1 = |Σx|² - Σ|x|²
    1ᵀKL1  = (Σx)ᵀ XᵀY (Σy) - (Σx)ᵀ Σ x|y|² - (Σy)ᵀ Σ y|x|² + Σ|x|²|y|²
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """The sums that HSIC_1 of two sides is a function of; `first` and `second` may be the same side.

    products [first dim, second dim] is XᵀY; sums Σx, Σy; norms Σ|x|², Σ|y|²; both Σ|x|²|y|²; weighted Σ x|y|²,
    Σ y|x|².
    """

    products: Tensor
    sums: tuple[Tensor, Tensor]
    norms: tuple[Tensor, Tensor]
    both: Tensor
    weighted: tuple[Tensor, Tensor]

    @classmethod
    def empty(cls, first: int, second: int, dtype: torch.dtype, device: torch.device) -> Moments:
        """Return the moments of no tokens, for sides of these widths."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        sums, weighted = (zeros(first), zeros(second)), (zeros(first), zeros(second))
        return cls(zeros(first, second), sums, (zeros(), zeros()), zeros(), weighted)

    def update(self, first: Tensor, second: Tensor) -> None:
        """Take in tokens [tokens, dim] of both sides, already less their references."""
        norms = first.square().sum(1), second.square().sum(1)
        self.products.addmm_(first.T, second)
        self.both += norms[0] @ norms[1]
        for side, (features, own, other) in enumerate(((first, *norms), (second, *norms[::-1]))):
            self.sums[side].add_(features.sum(0))
            self.norms[side].add_(own.sum())
            self.weighted[side].add_(other @ features)

    def merge(self, other: Moments) -> None:
        """Add the sums of other tokens, taken with the same references."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.add_(theirs)

    def hsic(self, count: int) -> Tensor:
        """Return HSIC_1 of `count` tokens."""
        (x, y), (x_norm, y_norm) = self.sums, self.norms
        trace = self.products.square().sum() - self.both
        total = (x @ x - x_norm) * (y @ y - y_norm) / ((count - 1) * (count - 2))
        rows = x @ self.products @ y - x @ self.weighted[0] - y @ self.weighted[1] + self.both
        return (trace + total - 2 * rows / (count - 2)) / (count * (count - 3))

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.products, *self.sums, *self.norms, self.both, *self.weighted)


def centered_gram(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the U-centered Gram matrix [tokens, tokens] of features [tokens, dim].

    HSIC_1 of two sides is the sum of the products of the entries of theirs, over n (n - 3) (Székely & Rizzo 2014).
    """
    features = features.to(dtype)
    features = features - features.mean(0)
    gram = features @ features.T
    gram.fill_diagonal_(0)
    count, rows = gram.shape[0], gram.sum(0)
    gram -= (rows[:, None] + rows) / (count - 2)
    gram += rows.sum() / ((count - 1) * (count - 2))
    return gram.fill_diagonal_(0)
