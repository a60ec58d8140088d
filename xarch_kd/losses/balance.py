"""`weight: auto`: scales that make the gradients of the parts of an objective on the student equal in norm.

They are measured at the first steps, against one part that keeps its weight (the anchor), and then fixed: a scale that
follows the gradient would undo the learning of a part that is nearly done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from xarch_kd.errors import CheckpointError, NonFiniteLoss, UsageError
from xarch_kd.ops.streaming.autograd import attach_gradients

# A part whose gradient is a hundred thousandth of the anchor's is at its goal or wrong: it is not blown up further.
LARGEST_SCALE: Final = 1e4


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Scales of the parts named in `parts`, from what was observed so far; `anchor` is the part they are made equal to.

    `ratios` are, by part, log(|gradient of the anchor| / |gradient of the part|) of each observation, at most
    `observations` of them. The scale is the exponential of their mean, at most 1e4 and at least 1e-4.

    Raises UsageError for no observation, parts that occur twice, or an anchor that is among the parts.
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


def gradient_norm(gradients: Sequence[Tensor | None]) -> float:
    """Return the norm of all gradients together; those that are None are 0."""
    parts = [torch.linalg.vector_norm(gradient.detach().float()) for gradient in gradients if gradient is not None]
    return float(torch.linalg.vector_norm(torch.stack(parts))) if parts else 0.0


def observed_loss(
    parts: Mapping[str, Tensor],
    balance: Balance,
    student: Sequence[Tensor],
    beside: Sequence[Tensor] = (),
    *,
    weights: Mapping[str, float] | None = None,
) -> tuple[Tensor, Balance]:
    """Return Σ weight · scale · part, and the balance after the norms of the parts' gradients on `student`.

    `student` and `beside` (for example projectors) are all trained parameters; gradient norms are measured on those of
    `student` only, before the parts' `weights` (None: 1). The gradient of each part is computed in this call, once, and
    the backward pass of the returned loss adds their weighted sum, with the scales of this call, to every parameter. So
    parts may allow only one backward pass, and a step costs one backward pass per part and memory for two sets of
    gradients.

    Raises:
        UsageError: the anchor is not among the parts.
        NonFiniteLoss: a gradient is NaN or infinite.
    """
    if balance.anchor not in parts:
        raise UsageError(
            "The part that weights are balanced against is missing.", asked=balance.anchor, allowed=" | ".join(parts)
        )
    leaves = [*student, *beside]
    live = [name for name, part in parts.items() if part.requires_grad]
    # The anchor first: each part's scale is then known as soon as its gradient is.
    order = sorted(live, key=lambda name: name != balance.anchor)
    against = 0.0
    sums: list[Tensor | None] = [None] * len(leaves)
    for place, name in enumerate(order):
        last = place == len(order) - 1
        gradients = torch.autograd.grad(parts[name], leaves, retain_graph=not last, allow_unused=True)
        norm = gradient_norm(gradients[: len(student)])
        against = norm if name == balance.anchor else against
        balance = balance.observe({balance.anchor: against, name: norm})
        factor = balance.scale(name) * (1.0 if weights is None else weights.get(name, 1.0))
        _add(sums, gradients, factor)
    total = _weighted(parts, balance, weights)
    return attach_gradients(total, leaves, sums) if order else total, balance


def _add(sums: list[Tensor | None], gradients: Sequence[Tensor | None], factor: float) -> None:
    for place, gradient in enumerate(gradients):
        if gradient is not None:
            held = sums[place]
            sums[place] = gradient * factor if held is None else held.add_(gradient, alpha=factor)


def _weighted(parts: Mapping[str, Tensor], balance: Balance, weights: Mapping[str, float] | None) -> Tensor:
    factors = {name: balance.scale(name) * (1.0 if weights is None else weights.get(name, 1.0)) for name in parts}
    return torch.stack([part.detach() * factors[name] for name, part in parts.items()]).sum()
