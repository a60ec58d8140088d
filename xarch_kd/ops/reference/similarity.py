"""The dense specification of `similarity`: HSIC_1 from the Gram matrices of all tokens.

HSIC_1 (Song et al. 2012, "Feature selection via dependence maximization", eq. 5) has no bias, where the plain estimate
grows with width / tokens until independent features look alike. With K, L the Gram matrices without their diagonals
and n tokens it is

    [tr(K L) + 1ᵀK1 1ᵀL1 / ((n - 1)(n - 2)) - 2 1ᵀKL1 / (n - 2)] / (n (n - 3)).
"""

from __future__ import annotations

import torch
from torch import Tensor


def hsic(first: Tensor, second: Tensor) -> Tensor:
    """Return HSIC_1 of two Gram matrices [tokens, tokens], whose diagonals are left out."""
    count = first.shape[0]
    first, second = (gram - torch.diag(gram.diagonal()) for gram in (first, second))
    rows = first.sum(0) @ second.sum(0)
    total = first.sum() * second.sum() / ((count - 1) * (count - 2))
    return ((first * second).sum() + total - 2 * rows / (count - 2)) / (count * (count - 3))


def dependences(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return HSIC_1 of student and teacher, of the student with itself and of the teacher with itself."""
    # It does not change when all tokens are shifted; the digits of a large common offset would be lost.
    grams = []
    for features in (student, teacher):
        centered = features.to(dtype) - features.to(dtype).mean(0)
        grams.append(centered @ centered.T)
    return hsic(grams[0], grams[1]), hsic(grams[0], grams[0]), hsic(grams[1], grams[1])
