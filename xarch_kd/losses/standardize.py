"""Standardized features: each dimension less the teacher's mean, over the teacher's deviation, both from calibration.

Features of language models have massive dimensions. Where student and teacher share one, angles and products of tokens
are those of that dimension alone, and objectives made of them go blind; where they do not, it takes all of a squared
error. Standardized, every dimension weighs the same. The statistics are the teacher's and fixed: those of the student's
own batch would make the objective blind to its scale, which then drifts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.ops import checks

# A dimension in which the teacher hardly varies would weigh without bound: its deviation is raised to this share of the
# median deviation.
LEAST_SHARE: Final = 1e-3
LEAST_TOKENS: Final = 2


@dataclass(frozen=True, eq=False)
class Standardizer:
    """x -> (x - mean) / deviation, both [dim] of the teacher; for its features and for what is compared with them.

    Raises UsageError for statistics that do not fit, are not finite or have a deviation of at most 0.

    >>> import torch
    >>> from xarch_kd.losses import Standardizer
    >>> Standardizer(mean=torch.ones(4), deviation=torch.full((4,), 2.0)).mean
    tensor([1., 1., 1., 1.])
    """

    mean: Tensor
    deviation: Tensor

    def __post_init__(self) -> None:
        checks.check_floating(mean=self.mean, deviation=self.deviation)
        if self.mean.dim() != 1:
            raise UsageError("mean does not fit.", found=list(self.mean.shape), allowed="[dim]")
        checks.check_shape("deviation", self.deviation, tuple(self.mean.shape), "[dim]")
        checks.require(
            checks.all_finite(self.mean, self.deviation),
            lambda: UsageError("Statistics of the teacher must be finite.", found="NaN or infinity"),
        )
        checks.require(
            (self.deviation > 0).all(),
            lambda: UsageError("A deviation must be above 0.", found=self.deviation.min().item(), allowed="> 0"),
        )

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return self.mean.shape[0]

    def to(self, device: torch.device | str) -> Standardizer:
        """Return it on another device."""
        return Standardizer(self.mean.to(device), self.deviation.to(device))

    def apply(self, features: Tensor) -> Tensor:
        """Return standardized features [..., dim], at least float32; gradients flow through."""
        checks.check_shape("features", features, (*features.shape[:-1], self.dim), "[..., dim of the statistics]")
        mean, deviation = self._like(features)
        return (features.to(mean.dtype) - mean) / deviation

    def fold(
        self, features: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (features, weight, bias) whose projection is the standardized projection of the given ones.

        features [..., student dim], weight [dim, student dim], bias [dim]; without a weight they are the
        projection. The projected features themselves are not built.
        """
        if weight is None:
            return self.apply(features), None, None
        checks.check_shape("weight", weight, (self.dim, weight.shape[1]), "[dim of the statistics, student dim]")
        mean, deviation = self._like(weight)
        offset = -mean if bias is None else bias.to(mean.dtype) - mean
        return features, weight.to(mean.dtype) / deviation[:, None], offset / deviation

    def state(self) -> dict[str, Tensor]:
        """Return its tensors by name, for a file."""
        return {"mean": self.mean, "deviation": self.deviation}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Standardizer:
        """Return the one that `state` came from."""
        return cls(state["mean"], state["deviation"])

    @classmethod
    def from_moments(cls, tokens: int, mean: Tensor, variance: Tensor) -> Standardizer:
        """Return the standardizer of a mean and variance [dim] over `tokens` tokens.

        Raises UsageError for fewer than 2 tokens, or a teacher that is the same at all of them.
        """
        if tokens < LEAST_TOKENS:
            raise UsageError("There is no deviation of so few tokens.", found=tokens, allowed=f">= {LEAST_TOKENS}")
        deviation = variance.double().clamp(min=0).sqrt()
        varying = deviation[deviation > 0]
        if varying.numel() == 0:
            raise UsageError("The teacher's features do not vary over the tokens.", found=f"{tokens} equal tokens")
        return cls(mean.double(), deviation.clamp(min=LEAST_SHARE * float(varying.median())))

    def _like(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        dtype = checks.accumulation_dtype(tensor)
        return self.mean.to(tensor.device, dtype), self.deviation.to(tensor.device, dtype)


class FeatureStatistics:
    """Mean and variance of each dimension over all tokens ever taken in, in float64; sums of parts can be merged.

    >>> import torch
    >>> from xarch_kd.losses import FeatureStatistics
    >>> statistics = FeatureStatistics()
    >>> statistics.update(torch.randn(2, 16, 8))
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.mean: Tensor | None = None
        self._squares: Tensor | None = None

    @torch.no_grad()
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Take in features [..., dim] of the tokens that count by `mask`, boolean with their leading axes."""
        checks.check_shape("mask", mask, tuple(features.shape[:-1]), "[leading axes of features]")
        checks.check_mask(mask)
        rows = (features.flatten(0, -2) if mask is None else features[mask]).double()
        if rows.shape[0] > 0:
            mean = rows.mean(0)
            self._add(rows.shape[0], mean, (rows - mean).square().sum(0))

    def merge(self, other: FeatureStatistics) -> None:
        """Add the tokens that `other` took in."""
        if other.mean is not None and other._squares is not None:
            self._add(other.tokens, other.mean, other._squares)

    def standardizer(self) -> Standardizer:
        """Return the standardizer of these statistics.

        Raises UsageError for fewer than 2 tokens, or features that do not vary.
        """
        if self.mean is None or self._squares is None:
            raise UsageError("There is no deviation of no tokens.", found=0, allowed=f">= {LEAST_TOKENS}")
        return Standardizer.from_moments(self.tokens, self.mean, self._squares / self.tokens)

    def _add(self, tokens: int, mean: Tensor, squares: Tensor) -> None:
        """Chan, Golub & LeVeque 1979: sums of squares about the means of two parts, about their common mean."""
        if self.mean is None or self._squares is None:
            self.tokens, self.mean, self._squares = tokens, mean.clone(), squares.clone()
            return
        checks.check_shape("features", mean, tuple(self.mean.shape), "[dim of the first call]")
        together = self.tokens + tokens
        gap = mean - self.mean
        self._squares += squares + gap.square() * (self.tokens * tokens / together)
        self.mean += gap * (tokens / together)
        self.tokens = together
