"""Linear projectors: full, low-rank, semi-orthogonal, identity."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from xarch_kd.errors import UsageError
from xarch_kd.projectors.base import Projector, Split, factors, isometry

# Largest entry of |weightᵀ weight - 1| in a semi-orthogonal weight computed from float32 factors.
ORTHOGONALITY: Final = 1e-3


class IdentityProjector(Projector):
    """Projector y = student, without parameters. Raises UsageError if the dimensions differ.

    >>> import torch
    >>> from xarch_kd.projectors import IdentityProjector
    >>> IdentityProjector(4, 4)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    kind = "identity"

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        if student_dim != teacher_dim:
            raise UsageError(
                "An identity keeps the dimension.",
                asked="projector: identity",
                found=f"student {student_dim}, teacher {teacher_dim}",
                fix="projector: linear, or auto",
            )
        super().__init__(student_dim, teacher_dim, student_dim)

    def split(self, student: Tensor) -> Split:
        """Return the student's features without a weight."""
        return Split(student, None, None)

    def matrix(self) -> Tensor:
        """Return the identity."""
        return torch.eye(self.teacher_dim)

    def set_linear_map(self, weight: Tensor, offset: Tensor | None = None) -> None:
        """Raise UsageError: an identity has no parameters to set."""
        raise UsageError("An identity has nothing to set.", fix="projector: linear, or init: random")


class LinearProjector(Projector):
    """Projector y = student weightᵀ (+ bias); weight is [teacher dim, student dim].

    Initialized as an isometry: the identity for equal dimensions, else a random semi-orthogonal matrix from
    `generator`.

    >>> import torch
    >>> from xarch_kd.projectors import LinearProjector
    >>> LinearProjector(4, 6)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 6])
    """

    kind = "linear"

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        bias: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(student_dim, teacher_dim, min(student_dim, teacher_dim))
        self.weight = nn.Parameter(isometry(teacher_dim, student_dim, generator=generator))
        self.bias = nn.Parameter(torch.zeros(teacher_dim)) if bias else None

    def split(self, student: Tensor) -> Split:
        """Return student, weight and bias."""
        return Split(student, self.weight, self.bias)

    def matrix(self) -> Tensor:
        """Return the weight."""
        return self.weight.detach()

    @torch.no_grad()
    def set_linear_map(self, weight: Tensor, offset: Tensor | None = None) -> None:
        """Copy the weight."""
        self.weight.copy_(weight)
        self._set_bias(offset)


class LowRankProjector(Projector):
    """Projector y = (student downᵀ) upᵀ (+ bias); down is [rank, student dim], up [teacher dim, rank].

    Both are initialized as semi-orthogonal matrices from `generator`. `rank` defaults to 1/4 of the smaller dimension.

    >>> import torch
    >>> from xarch_kd.projectors import LowRankProjector
    >>> LowRankProjector(4, 6, rank=2)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 6])
    """

    kind = "low_rank"

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        rank: int | None = None,
        bias: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(student_dim, teacher_dim, default_rank(student_dim, teacher_dim, rank))
        self.down = nn.Parameter(isometry(self.rank, student_dim, generator=generator))
        self.up = nn.Parameter(isometry(teacher_dim, self.rank, generator=generator))
        self.bias = nn.Parameter(torch.zeros(teacher_dim)) if bias else None

    def split(self, student: Tensor) -> Split:
        """Return student downᵀ [..., rank], up and bias."""
        return Split(nn.functional.linear(student, self.down), self.up, self.bias)

    def matrix(self) -> Tensor:
        """Return up · down."""
        return self.up.detach() @ self.down.detach()

    @torch.no_grad()
    def set_linear_map(self, weight: Tensor, offset: Tensor | None = None) -> None:
        """Set the factors, of equal norm, to those of the nearest weight of this rank."""
        up, down = factors(weight, self.rank)
        self.up.copy_(up)
        self.down.copy_(down)
        self._set_bias(offset)


class OrthogonalProjector(Projector):
    """Projector y = student weightᵀ (+ bias) whose weight [teacher dim, student dim] stays semi-orthogonal in training.

    If student dim <= teacher dim it preserves norms and angles, so it cannot fit the teacher without the student.
    The weight is the orthogonal factor of the QR decomposition, with a positive diagonal of R, of the parameter `basis`
    [larger dim, smaller dim]: a semi-orthogonal basis is its own factor.

    >>> import torch
    >>> from xarch_kd.projectors import OrthogonalProjector
    >>> OrthogonalProjector(4, 6)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 6])
    """

    kind = "orthogonal"

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        bias: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(student_dim, teacher_dim, min(student_dim, teacher_dim))
        self.wide = student_dim > teacher_dim
        start = isometry(teacher_dim, student_dim, generator=generator)
        self.basis = nn.Parameter(start.T.contiguous() if self.wide else start)
        self.bias = nn.Parameter(torch.zeros(teacher_dim)) if bias else None

    @property
    def weight(self) -> Tensor:
        """The semi-orthogonal weight [teacher dim, student dim], with its graph."""
        factor, triangle = torch.linalg.qr(self.basis)
        diagonal = triangle.detach().diagonal()
        factor = factor * torch.where(diagonal < 0, -1.0, 1.0).to(factor.dtype)
        return factor.T if self.wide else factor

    def split(self, student: Tensor) -> Split:
        """Return student, the semi-orthogonal weight and bias."""
        return Split(student, self.weight, self.bias)

    def matrix(self) -> Tensor:
        """Return the semi-orthogonal weight."""
        return self.weight.detach()

    @torch.no_grad()
    def set_linear_map(self, weight: Tensor, offset: Tensor | None = None) -> None:
        """Copy a semi-orthogonal weight. Raises UsageError for any other."""
        basis = weight.T if self.wide else weight
        error = float((basis.T @ basis - torch.eye(self.rank, dtype=basis.dtype, device=basis.device)).abs().max())
        if not error <= ORTHOGONALITY:
            raise UsageError(
                "An orthogonal projector takes a semi-orthogonal weight.",
                found=f"columns or rows whose products are off by {error:.2g}",
                fix="init: procrustes or pca",
            )
        self.basis.copy_(basis)
        self._set_bias(offset)


def default_rank(student_dim: int, teacher_dim: int, rank: int | None) -> int:
    """Return the rank of a low-rank projector. Raises UsageError if it is out of range."""
    smaller = min(student_dim, teacher_dim)
    if rank is None:
        return max(1, smaller // 4)
    if not 1 <= rank <= smaller:
        raise UsageError(
            "A projector cannot have this rank.",
            asked=f"rank: {rank}",
            found=f"student {student_dim}, teacher {teacher_dim}",
            allowed=f"1 to {smaller}",
        )
    return rank
