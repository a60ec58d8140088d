"""Projector with one hidden layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from xarch_kd.errors import UsageError
from xarch_kd.projectors.base import Projector, Split, factors, isometry


class MLPProjector(Projector):
    """Projector y = silu(student innerᵀ + inner_bias) outerᵀ (+ bias).

    `inner` is [hidden, student dim], `outer` [teacher dim, hidden].

    An MLP can fit the teacher without the student's help: prefer a linear projector. It is initialized, and fitted, as
    a linear map of rank `hidden` / 2: silu(z) - silu(-z) = z, so two hidden units of opposite sign are one linear unit.
    Remaining units have random incoming and zero outgoing weights. `hidden` is by default twice the smaller dimension,
    which can represent every linear map.

    Raises UsageError for fewer than 2 hidden units.

    >>> import torch
    >>> from xarch_kd.projectors import MLPProjector
    >>> MLPProjector(4, 6, hidden=8)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 6])
    """

    kind = "mlp"

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        hidden: int | None = None,
        bias: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        self.hidden = default_hidden(student_dim, teacher_dim, hidden)
        super().__init__(student_dim, teacher_dim, min(self.hidden // 2, student_dim, teacher_dim))
        self.inner = nn.Parameter(torch.empty(self.hidden, student_dim))
        self.inner_bias = nn.Parameter(torch.zeros(self.hidden))
        self.outer = nn.Parameter(torch.empty(teacher_dim, self.hidden))
        self.bias = nn.Parameter(torch.zeros(teacher_dim)) if bias else None
        nn.init.normal_(self.inner, std=student_dim**-0.5, generator=generator)
        self.set_linear_map(isometry(teacher_dim, student_dim, generator=generator))

    def split(self, student: Tensor) -> Split:
        """Return the hidden units [..., hidden], the outer weight and bias."""
        units = functional.silu(functional.linear(student, self.inner, self.inner_bias))
        return Split(units, self.outer, self.bias)

    def matrix(self) -> Tensor:
        """Return the Jacobian at a student of 0, [teacher dim, student dim]; the map itself is not linear."""
        at = self.inner_bias.detach()
        slope = at.sigmoid() * (1 + at * (1 - at.sigmoid()))
        return (self.outer.detach() * slope) @ self.inner.detach()

    @torch.no_grad()
    def set_linear_map(self, weight: Tensor, offset: Tensor | None = None) -> None:
        """Set pairs of hidden units to the nearest linear map of this rank; other units get zero outgoing weights."""
        up, down = factors(weight, self.rank)
        paired = 2 * self.rank
        self.inner[:paired] = torch.cat((down, -down)).to(self.inner)
        self.inner_bias.zero_()
        self.outer.zero_()
        self.outer[:, :paired] = torch.cat((up, -up), dim=1).to(self.outer)
        self._set_bias(offset)


def default_hidden(student_dim: int, teacher_dim: int, hidden: int | None) -> int:
    """Return the number of hidden units of an MLP. Raises UsageError for fewer than 2."""
    if hidden is None:
        return 2 * min(student_dim, teacher_dim)
    if hidden < 2:
        raise UsageError("An MLP is initialized as pairs of hidden units.", asked=f"hidden: {hidden}", allowed=">= 2")
    return hidden
