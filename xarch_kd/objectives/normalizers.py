"""Loss normalizers of one optimizer step, over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xarch_kd.mapping_file.objectives import Align


@dataclass(frozen=True, kw_only=True)
class LossNormalizers:
    """Divisors of the sums of a step, over all of its micro-batches and ranks.

    `tokens` are unmasked positions, `labelled` those of them with a label, `predictions` positions whose next token
    counts, `teacher_sq_norms` Σ‖teacher‖² by pair. Objectives return sums over one micro-batch divided by these, so
    that the micro-batches of a step add up to the loss of one large batch.
    """

    tokens: Tensor | float = 0.0
    labelled: Tensor | float = 0.0
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
            labelled=self.labelled + other.labelled,
            predictions=self.predictions + other.predictions,
            teacher_sq_norms=teacher_sq_norms,
        )

    def of_entry(self, entry: Align) -> LossNormalizers:
        """Return the normalizers of an entry of `align`, whose `tokens` are those that count in it."""
        return self if entry.tokens == "all" else replace(self, tokens=self.labelled)

    def reduced(self, over_ranks: Callable[[Tensor], Tensor]) -> LossNormalizers:
        """Return the sums over all ranks; `over_ranks` sums a float64 vector over them, in one call for all numbers.

        Every rank must hold the same pairs, which the plan they share sees to.
        """
        parts = [self.tokens, self.labelled, self.predictions, *self.teacher_sq_norms.values()]
        device = next((part.device for part in parts if isinstance(part, Tensor)), None)
        vector = torch.stack([torch.as_tensor(part, dtype=torch.float64, device=device) for part in parts])
        tokens, labelled, predictions, *norms = over_ranks(vector).unbind()
        return LossNormalizers(
            tokens=tokens,
            labelled=labelled,
            predictions=predictions,
            teacher_sq_norms=dict(zip(self.teacher_sq_norms, norms, strict=True)),
        )
