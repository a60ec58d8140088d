"""Base class of projectors: a map of features whose last layer is linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Split(NamedTuple):
    """Inputs of a projector's last layer: features [..., dim], weight [teacher dim, dim], bias [teacher dim].

    If the weight is None the features are the result.

    >>> import torch
    >>> from xarch_kd.projectors import LinearProjector
    >>> LinearProjector(4, 6).split(torch.randn(2, 3, 4)).weight.shape
    torch.Size([6, 4])
    """

    features: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Projector(nn.Module, ABC):
    """Map from student features [..., student dim] to teacher features [..., teacher dim].

    Objectives use `split`: `projected_distance` multiplies its parts block by block, so that the projected features
    are never stored. `rank` is the largest rank of a linear map that the projector can represent.

    >>> from xarch_kd.projectors import LinearProjector, Projector
    >>> issubclass(LinearProjector, Projector)
    True
    """

    kind: ClassVar[str]
    # A linear map that can be fitted to calibration text, and measured there.
    has_closed_form: ClassVar[bool] = True

    def __init__(self, student_dim: int, teacher_dim: int, rank: int) -> None:
        super().__init__()
        self.student_dim, self.teacher_dim, self.rank = student_dim, teacher_dim, rank

    @property
    def has_bias(self) -> bool:
        """True if an offset is added."""
        return getattr(self, "bias", None) is not None

    @abstractmethod
    def split(self, student: Tensor) -> Split:
        """Return the inputs of the last layer, with their graph."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return the linear map [teacher dim, student dim], without a gradient."""

    @abstractmethod
    def set_linear_map(self, weight: Tensor, offset: Tensor | None = None) -> None:
        """Set the parameters to the linear map `weight` [teacher dim, student dim], truncated to `rank`, plus `offset`.

        A projector without a bias ignores the offset.
        """

    def forward(self, student: Tensor) -> Tensor:
        """Return the projected features [..., teacher dim]."""
        features, weight, bias = self.split(student)
        return features if weight is None else functional.linear(features, weight, bias)

    def extra_repr(self) -> str:
        """Return dimensions and rank."""
        return f"{self.student_dim} -> {self.teacher_dim}, rank {self.rank}"

    def _set_bias(self, offset: Tensor | None) -> None:
        bias = getattr(self, "bias", None)
        if bias is not None and offset is not None:
            bias.copy_(offset)


def isometry(
    rows: int, columns: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the identity, or a random semi-orthogonal matrix [rows, columns] if the two differ."""
    matrix = torch.empty(rows, columns, dtype=dtype)
    if rows == columns:
        return nn.init.eye_(matrix)
    return nn.init.orthogonal_(matrix, generator=generator)


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up [rows, rank] and down [rank, columns], of equal norm, with product nearest to weight, in float64."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
