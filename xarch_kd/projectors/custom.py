"""Projectors that a user's factory builds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from xarch_kd.errors import UsageError
from xarch_kd.projectors.base import Projector, Split


class CustomProjector(Projector):
    """Module of a user's factory, student features [..., student dim] → [..., teacher dim].

    Its map need not be linear, so it has no closed form and is left out of the projector report. Raises UsageError for
    an object that is no module, and on use for an output of another shape.

    >>> import torch
    >>> from xarch_kd.projectors import CustomProjector
    >>> projector = CustomProjector("mine", torch.nn.Linear(8, 16), 8, 16)
    >>> list(projector(torch.zeros(1, 4, 8)).shape)
    [1, 4, 16]
    """

    kind = "custom"
    has_closed_form = False

    def __init__(self, name: str, module: nn.Module, student_dim: int, teacher_dim: int) -> None:
        super().__init__(student_dim, teacher_dim, min(student_dim, teacher_dim))
        if not isinstance(module, nn.Module):
            raise UsageError(
                f"The projector '{name}' is built by a function that returns no module.",
                asked=f"projectors={{{name!r}: …}}, called with ({student_dim}, {teacher_dim})",
                found=type(module).__name__,
                allowed="a torch.nn.Module, a new one at each call",
            )
        self.name, self.module = name, module

    def split(self, student: Tensor) -> Split:
        """Return the projected features, without a last product."""
        projected = self.module(student)
        allowed = (*student.shape[:-1], self.teacher_dim)
        if not isinstance(projected, Tensor) or tuple(projected.shape) != allowed:
            raise UsageError(
                f"The projector '{self.name}' returned another shape than the teacher's features.",
                asked=f"{list(student.shape)} → {list(allowed)}",
                found=list(projected.shape) if isinstance(projected, Tensor) else type(projected).__name__,
                allowed="[..., teacher dim] for [..., student dim]",
            )
        return Split(projected, None, None)

    def matrix(self) -> Tensor:
        """Raise UsageError: the map need not be linear."""
        raise UsageError(f"The projector '{self.name}' is custom and has no matrix.")

    def set_linear_map(self, weight: Tensor, offset: Tensor | None = None) -> None:
        """Raise UsageError: the map need not be linear."""
        raise UsageError(f"The projector '{self.name}' is custom and has no closed form.", fix="init: random")


def build_custom_projector(
    name: str, factory: Callable[..., nn.Module], student_dim: int, teacher_dim: int, *, seed: int
) -> CustomProjector:
    """Return the projector that `factory(student_dim, teacher_dim)` builds, run once on zeros to check its shape.

    Its random weights follow `seed`; the global random state is left as it was.

    Raises:
        UsageError: the factory returns no module, or the module returns another shape.

    >>> import torch
    >>> from xarch_kd.projectors import build_custom_projector
    >>> projector = build_custom_projector("mine", torch.nn.Linear, 8, 16, seed=0)
    >>> projector.student_dim, projector.teacher_dim
    (8, 16)
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        with torch.enable_grad():
            projector = CustomProjector(name, factory(student_dim, teacher_dim), student_dim, teacher_dim)
        projector.split(torch.zeros(1, 2, student_dim))
    return projector
