"""`weight: auto`: scales that make the gradients of the parts of an objective on the student equal in norm.

They are measured at the first steps, against one part that keeps its weight (the anchor), and then fixed: a scale that
follows the gradient would undo the learning of a part that is nearly done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from xarch_kd.errors import CheckpointError, NonFiniteLoss, UsageError

# A part whose gradient is a hundred thousandth of the anchor's is at its goal or wrong: it is not blown up further.
LARGEST_SCALE: Final = 1e4


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Scales of the parts named in `parts`, from what was observed so far; `anchor` is the part they are made equal to.

    `ratios` are, by part, log(|gradient of the anchor| / |gradient of the part|) of each observation, at most
    `observations` of them. The scale is the exponential of their mean, at most 1e4 and at least 1e-4.

    Raises UsageError for no observation, parts that occur twice, or an anchor that is among the parts.

    >>> from xarch_kd.losses import Balance
    >>> Balance(anchor="logits", parts=("hidden",), observations=2).anchor
    'logits'
    """

    anchor: str
    parts: tuple[str, ...]
    observations: int = 4
    ratios: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.observations < 1:
            raise UsageError("Weights are balanced at one step or more.", asked=self.observations, allowed=">= 1")
        if len({self.anchor, *self.parts}) != 1 + len(self.parts):
            raise UsageError(
                "The parts to balance and the one they are balanced against must differ.",
                asked=f"parts {', '.join(self.parts)}, against {self.anchor}",
            )

    @property
    def done(self) -> bool:
        """True if the scales are final."""
        return all(len(self.ratios.get(part, ())) >= self.observations for part in self.parts)

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each part; 1 for one that was not observed yet."""
        return {part: self._scale(self.ratios.get(part, ())) for part in self.parts}

    def scale(self, part: str) -> float:
        """Return the scale of any part: 1 for the anchor and for parts that are not balanced."""
        return self._scale(self.ratios.get(part, ()))

    def observe(self, norms: Mapping[str, float]) -> Balance:
        """Return the balance after these norms of gradients on the student, by part.

        Parts that are missing, or whose norm or the anchor's is 0, are not counted: a micro-batch without a valid token
        has no norm. Several ranks must observe the same norms, for example their mean.

        Raises NonFiniteLoss for a norm that is NaN or infinite.
        """
        for part, norm in norms.items():
            if not math.isfinite(norm):
                raise NonFiniteLoss("A gradient is not finite.", asked=f"objective {part}", found=norm)
        against = norms.get(self.anchor, 0.0)
        ratios = dict(self.ratios)
        for part in self.parts:
            seen, norm = ratios.get(part, ()), norms.get(part, 0.0)
            if against > 0 and norm > 0 and len(seen) < self.observations:
                ratios[part] = (*seen, math.log(against / norm))
        return replace(self, ratios=ratios)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint or a report keeps, of plain numbers and strings; `scales` is there to be read."""
        return {
            "anchor": self.anchor,
            "parts": list(self.parts),
            "observations": self.observations,
            "ratios": {part: list(ratios) for part, ratios in self.ratios.items()},
            "scales": self.scales,
        }

    def load(self, state: Mapping[str, Any]) -> Balance:
        """Return the balance that `state` came from.

        Raises CheckpointError when it is of other parts than this one.
        """
        for name, own in (("anchor", self.anchor), ("parts", list(self.parts)), ("observations", self.observations)):
            if state.get(name) != own:
                raise CheckpointError(
                    "The balanced weights of the checkpoint are of another stage.",
                    asked=f"{name} {own}",
                    found=state.get(name),
                )
        return replace(self, ratios={part: tuple(ratios) for part, ratios in state["ratios"].items()})

    @staticmethod
    def _scale(ratios: Sequence[float]) -> float:
        if not ratios:
            return 1.0
        limit = math.log(LARGEST_SCALE)
        return math.exp(min(max(sum(ratios) / len(ratios), -limit), limit))
