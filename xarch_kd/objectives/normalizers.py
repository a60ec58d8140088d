"""What the sums of a training step are divided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossNormalizers:
    """What the sums of a step are divided by, over all its micro-batches and ranks.

    `tokens` are unmasked positions, `predictions` positions whose next token counts, `energies` Σ‖teacher‖² by pair.
    """

    tokens: Tensor | float = 0.0
    predictions: Tensor | float = 0.0
    teacher_sq_norms: Mapping[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: LossNormalizers) -> LossNormalizers:
        names = {**self.teacher_sq_norms, **other.teacher_sq_norms}
        teacher_sq_norms = {
            name: sum(
                (side.teacher_sq_norms[name] for side in (self, other) if name in side.teacher_sq_norms),
                torch.zeros(()),
            )
            for name in names
        }
        return LossNormalizers(
            tokens=self.tokens + other.tokens,
            predictions=self.predictions + other.predictions,
            teacher_sq_norms=teacher_sq_norms,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> LossNormalizers:
        """Return the counts with `function` applied to each of them as a tensor."""
        return LossNormalizers(
            tokens=function(torch.as_tensor(self.tokens)),
            predictions=function(torch.as_tensor(self.predictions)),
            teacher_sq_norms={
                name: function(teacher_sq_norm) for name, teacher_sq_norm in self.teacher_sq_norms.items()
            },
        )
