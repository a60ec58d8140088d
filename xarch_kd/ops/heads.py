"""Language-model heads, as the operations on next-token distributions take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """A language-model head: logits = softcap(scale * (hidden weightᵀ + bias)).

    `weight` is [vocabulary, dim] and `bias` [vocabulary]; `softcap` c is z ← c tanh(z / c). An operation takes the
    weight alone where there is nothing else.

    >>> import torch
    >>> from xarch_kd.losses import Head
    >>> Head(torch.randn(50, 8)).weight.shape
    torch.Size([50, 8])
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def detach(self) -> Head:
        """Return the head without its graph."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """Hidden states [tokens, dim] of one model and the head that they are multiplied by."""

    hidden: Tensor
    head: Head

    def detach(self) -> HeadInputs:
        """Return both without their graph."""
        return HeadInputs(self.hidden.detach(), self.head.detach())


def as_head(head: Head | Tensor) -> Head:
    """Return a head, given as one or as its weight."""
    return head if isinstance(head, Head) else Head(head)
