"""Layer map that is trained with the student: attention over the teacher's layers."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping.layer_map import LayerMap, check_depths, usage_entropy

# Total weight that an initial map leaves to all teacher layers: a weight of 0 could not grow.
SPREAD: Final = 0.1
# Avoids division by 0 for a teacher layer that is matched perfectly.
TINY: Final = 1e-12


class LearnedMapLosses(NamedTuple):
    """Losses for the student, `student` [student layers], and for the map itself, `map` (scalar): add both.

    >>> import torch
    >>> from xarch_kd.layer_mapping import LearnedMapLosses
    >>> LearnedMapLosses(student=torch.tensor(0.5), map=torch.tensor(0.7)).map
    tensor(0.7000)
    """

    student: Tensor
    map: Tensor


class LearnedMap(nn.Module):
    """Weights softmax(logits / τ) [student layers, teacher layers], trained with the student.

    τ changes geometrically from `temperature` to `final_temperature` over training, so that rows end near one-hot;
    with None it is constant. The caller passes the fraction of training done as `progress`, 0 to 1: the logits are
    the only state. `initial` is the initial map; without one, and in rows of 0, all weights are equal.

    Such a map tends to collapse onto the teacher layer that is easiest to match. Three measures prevent that: the
    student's loss uses detached weights; the map's loss uses detached layer losses, each divided by the mean of its
    teacher layer over the student layers, so that a layer is chosen by the student layers that match it better than
    others do; and the entropy of the mean row is kept above `usage_floor` × its maximum. `LayerMap.collapsed` reports
    a map that collapsed all the same.

    Raises UsageError for options out of range.

    >>> from xarch_kd.layer_mapping import LearnedMap
    >>> LearnedMap(2, 4)
    LearnedMap()
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

    def forward(self, losses: Tensor, progress: float) -> LearnedMapLosses:
        """Return the loss of each student layer, and the loss of the map itself.

        `losses` [student layers, teacher layers] are those of each pair: non-negative, not yet weighted.

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
        map_loss = (weights * relative).sum(1).mean() + self._shortfall(weights)
        return LearnedMapLosses((weights.detach() * losses).sum(1), map_loss)

    def layer_map(self, progress: float) -> LayerMap:
        """Return the current map, without a gradient."""
        logits = self.logits.detach().to("cpu", torch.float64)
        return LayerMap("learned", torch.softmax(logits / self.temperature(progress), dim=1))

    def _shortfall(self, weights: Tensor) -> Tensor:
        """Return the amount (nats) by which the entropy of the mean row is below its floor."""
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
