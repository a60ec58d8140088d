"""What every projector is: a map of features whose last part is linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional


class Split(NamedTuple):
    """A projection before its last product: features [..., width], weight [teacher width, width], bias [teacher width].

    Without a weight the features are the projection.
    """

    features: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Projector(nn.Module, ABC):
    """Student features [..., student width] → [..., teacher width].

    Objectives read `split`, whose parts `projected_distance` multiplies a few tokens at a time; the projected features
    are never kept.
    """

    @abstractmethod
    def split(self, student: Tensor) -> Split:
        """Return what the projection is the product of, with its graph."""

    def forward(self, student: Tensor) -> Tensor:
        """Return the projected features [..., teacher width]."""
        features, weight, bias = self.split(student)
        return features if weight is None else functional.linear(features, weight, bias)
