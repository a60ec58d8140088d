"""Schedules of an objective's weight over a stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from xarch_kd.errors import UsageError, suggest

# Name -> share of the way from `initial` to `final` at a share of the time between start and end.
SHAPES: Final[Mapping[str, Callable[[float], float]]] = MappingProxyType(
    {
        "constant": lambda share: 0.0,
        "linear": lambda share: share,
        "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
    }
)


@dataclass(frozen=True, kw_only=True)
class WeightSchedule:
    """A factor of an objective's weight, by the progress of its stage: the share of its steps that are done.

    `start` and `end` are such shares. `constant` is `initial` for start <= progress < end (to the last step when end is
    1) and 0 outside, so that the objective is not computed there. `linear` and `cosine` are `initial` until start,
    `final` from end on, and go from one to the other between, cosine with a level beginning and end.

    Raises UsageError for an unknown kind, shares that are not 0 <= start < end <= 1 and factors below 0.

    >>> from xarch_kd.losses import WeightSchedule
    >>> WeightSchedule(kind="linear", initial=1.0, final=0.0).kind
    'linear'
    """

    kind: str = "constant"
    start: float = 0.0
    end: float = 1.0
    initial: float = 1.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SHAPES:
            raise UsageError(
                f"There is no such schedule.{suggest(self.kind, SHAPES)}", asked=self.kind, allowed=" | ".join(SHAPES)
            )
        if not 0 <= self.start < self.end <= 1:
            raise UsageError(
                "A schedule starts before it ends, both as fractions of the stage.",
                asked=f"start {self.start}, end {self.end}",
                allowed="0 <= start < end <= 1",
            )
        for name, factor in (("initial", self.initial), ("final", self.final)):
            if not (factor >= 0 and math.isfinite(factor)):
                raise UsageError(f"The {name} factor of a weight must not be negative.", asked=factor, allowed=">= 0")

    def factor(self, progress: float) -> float:
        """Return the factor at `progress`, 0 before the first step and 1 after the last.

        Raises UsageError for progress outside of that.
        """
        if not 0 <= progress <= 1:
            raise UsageError("Progress is a share of the stage.", found=progress, allowed="0 to 1")
        if self.kind == "constant" and (progress < self.start or (progress >= self.end and self.end < 1)):
            return 0.0
        share = min(max((progress - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.initial + (self.final - self.initial) * SHAPES[self.kind](share)
