"""A layer map that is trained with the student: attention over the teacher's layers."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping.layer_map import LayerMap, check_depths, usage_entropy

# A start from a given map leaves this much to all teacher layers, so that no weight is 0 and can grow.
SPREAD: Final = 0.1
# Keeps a teacher layer that is matched perfectly from dividing by 0.
TINY: Final = 1e-12


class LearnedMatch(NamedTuple):
    """`match` [student layers] trains the student and the scalar `objective` trains the map; add both to the loss."""

    match: Tensor
    objective: Tensor


class LearnedMap(nn.Module):
    """Weights softmax(logits / τ) [student layers, teacher layers], trained with the student.

    τ goes from `temperature` to `final_temperature` geometrically over the training, so the rows end near one-hot; with
    None it stays. Where training stands is `progress`, from 0 to 1, told by the caller: the logits are all the state.
    `initial` is the map to start from; without one, and in rows of 0, all weights are equal.

    Such a map would collapse onto the teacher layer that is easiest to match. Three things hold against it: the student
    sees fixed weights and cannot move them to layers it already matches; the map sees losses without the student's
    gradient, each divided by the mean of its teacher layer over the student layers, so a layer is chosen by those that
    match it better than others do; and the entropy of the layers in use is kept above `usage_floor` × its maximum.
    `LayerMap.collapsed` tells when this was not enough.

    Raises UsageError for options out of range.
    """

    def __init__(
        self,
        student_layers: int,
        teacher_layers: int,
        *,
        temperature: float = 1.0,
        final_temperature: float | None = None,
        usage_floor: float = 0.5,
        initial: LayerMap | None = None,
    ) -> None:
        super().__init__()
        check_depths("learned", student_layers, teacher_layers)
        for name, value in (("temperature", temperature), ("final_temperature", final_temperature)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"layers: {name} of learned is out of range", found=value, allowed="> 0")
        if not 0 <= usage_floor <= 1:
            raise UsageError("layers: usage_floor of learned is out of range", found=usage_floor, allowed="0 to 1")
        self.start, self.end = temperature, temperature if final_temperature is None else final_temperature
        self.usage_floor = usage_floor
        self.logits = nn.Parameter(torch.zeros(student_layers, teacher_layers))
        if initial is not None:
            self._start_from(initial)

    def temperature(self, progress: float) -> float:
        """Return τ at `progress`: start^(1 - progress) · end^progress."""
        if not 0 <= progress <= 1:
            raise UsageError("layers: the progress of a learned map is out of range", found=progress, allowed="0 to 1")
        return self.start ** (1 - progress) * self.end**progress

    def weights(self, progress: float) -> Tensor:
        """Return the weights [student layers, teacher layers], with a gradient to the logits."""
        return torch.softmax(self.logits / self.temperature(progress), dim=1)

    def forward(self, losses: Tensor, progress: float) -> LearnedMatch:
        """Return the match of each student layer, and the map's own objective.

        `losses` are those of each pair, [student layers, teacher layers], non-negative and not yet weighted.

        Raises UsageError for losses that do not fit.
        """
        if losses.shape != self.logits.shape:
            raise UsageError(
                "layers: the losses of a learned map do not fit",
                found=list(losses.shape),
                allowed=f"{list(self.logits.shape)} [student layers, teacher layers]",
            )
        weights = self.weights(progress).to(losses.dtype)
        fixed = losses.detach()
        relative = fixed / fixed.mean(0, keepdim=True).clamp_min(TINY)
        objective = (weights * relative).sum(1).mean() + self._shortfall(weights)
        return LearnedMatch((weights.detach() * losses).sum(1), objective)

    def layer_map(self, progress: float) -> LayerMap:
        """Return the map as it is now, without a gradient."""
        logits = self.logits.detach().to("cpu", torch.float64)
        return LayerMap("learned", torch.softmax(logits / self.temperature(progress), dim=1))

    def _shortfall(self, weights: Tensor) -> Tensor:
        """Return how far the entropy of the layers in use is below its floor, in nats."""
        floor = self.usage_floor * math.log(min(weights.shape))
        return (floor - usage_entropy(weights)).clamp_min(0)

    def _start_from(self, initial: LayerMap) -> None:
        if initial.weights.shape != self.logits.shape:
            raise UsageError(
                "layers: the map that learned starts from does not fit",
                found=list(initial.weights.shape),
                allowed=f"{list(self.logits.shape)} [student layers, teacher layers]",
            )
        spread = (1 - SPREAD) * initial.weights + SPREAD / initial.weights.shape[1]
        with torch.no_grad():
            self.logits.copy_(self.start * spread.log())
