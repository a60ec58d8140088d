"""What the sums of a training step are divided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the sums of a step are divided by, over all its micro-batches and ranks.

    `tokens` are unmasked positions, `predictions` positions whose next token counts, `energies` Σ‖teacher‖² by pair.
    """

    tokens: Tensor | float = 0.0
    predictions: Tensor | float = 0.0
    energies: Mapping[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        names = {**self.energies, **other.energies}
        energies = {
            name: sum((side.energies[name] for side in (self, other) if name in side.energies), torch.zeros(()))
            for name in names
        }
        return Counts(
            tokens=self.tokens + other.tokens, predictions=self.predictions + other.predictions, energies=energies
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Counts:
        """Return the counts with `function` applied to each of them as a tensor."""
        return Counts(
            tokens=function(torch.as_tensor(self.tokens)),
            predictions=function(torch.as_tensor(self.predictions)),
            energies={name: function(energy) for name, energy in self.energies.items()},
        )
