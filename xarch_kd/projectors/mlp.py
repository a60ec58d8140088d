"""A projector with one hidden layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from xarch_kd.errors import UsageError
from xarch_kd.projectors.base import Projector, Split, factors, isometry


class MLPProjector(Projector):
    """y = silu(student inᵀ + in_bias) outᵀ (+ bias); inner.weight is [width, student width], outer [teacher, width].

    It can do much of the student's work by itself: prefer a linear one. It starts, and is fitted, as a linear map of
    rank `width` / 2: silu(z) - silu(-z) = z, so hidden units in pairs of opposite sign are one linear unit. Units left
    over have random incoming and no outgoing weights. `width` is by default twice the smaller width, which holds every
    linear map.

    Raises UsageError for a width below 2.
    """

    kind = "mlp"

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        width: int | None = None,
        bias: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        self.width = default_width(student_width, teacher_width, width)
        super().__init__(student_width, teacher_width, min(self.width // 2, student_width, teacher_width))
        self.inner = nn.Parameter(torch.empty(self.width, student_width))
        self.inner_bias = nn.Parameter(torch.zeros(self.width))
        self.outer = nn.Parameter(torch.empty(teacher_width, self.width))
        self.bias = nn.Parameter(torch.zeros(teacher_width)) if bias else None
        nn.init.normal_(self.inner, std=student_width**-0.5, generator=generator)
        self.become(isometry(teacher_width, student_width, generator=generator))

    def split(self, student: Tensor) -> Split:
        """Return the hidden units [..., width], the outer weight and bias."""
        hidden = functional.silu(functional.linear(student, self.inner, self.inner_bias))
        return Split(hidden, self.outer, self.bias)

    def matrix(self) -> Tensor:
        """Return the derivative at a student of 0, [teacher width, student width]; the map itself is not linear."""
        at = self.inner_bias.detach()
        slope = at.sigmoid() * (1 + at * (1 - at.sigmoid()))
        return (self.outer.detach() * slope) @ self.inner.detach()

    @torch.no_grad()
    def become(self, weight: Tensor, offset: Tensor | None = None) -> None:
        """Take over the nearest linear map of its rank, in pairs of hidden units; other units do not contribute."""
        up, down = factors(weight, self.rank)
        paired = 2 * self.rank
        self.inner[:paired] = torch.cat((down, -down)).to(self.inner)
        self.inner_bias.zero_()
        self.outer.zero_()
        self.outer[:, :paired] = torch.cat((up, -up), dim=1).to(self.outer)
        self._set_bias(offset)


def default_width(student_width: int, teacher_width: int, width: int | None) -> int:
    """Return how many hidden units an MLP has. Raises UsageError for fewer than 2."""
    if width is None:
        return 2 * min(student_width, teacher_width)
    if width < 2:
        raise UsageError("An MLP starts as pairs of hidden units.", asked=f"width: {width}", allowed=">= 2")
    return width
