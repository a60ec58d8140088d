"""Means over seeds with 95 % intervals of Student's t, and differences of two arms paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

# 97.5 % quantiles of Student's t by degrees of freedom.
QUANTILES: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over `count` values; `half` is half the width of its interval, None for one value."""

    mean: float
    half: float | None
    count: int

    @property
    def is_below_zero(self) -> bool:
        """True if the whole interval is."""
        return self.half is not None and self.mean + self.half < 0

    @property
    def is_above_zero(self) -> bool:
        """True if the whole interval is."""
        return self.half is not None and self.mean - self.half > 0


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean and half the width of its 95 % interval, t · s / √n."""
    count = len(values)
    half = None
    if count > 1:
        half = QUANTILES[count - 1] * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean=statistics.fmean(values), half=half, count=count)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval | None:
    """Return the interval of value - reference over the seeds that both have, or None if there is no such seed."""
    seeds = sorted(values.keys() & reference.keys())
    return mean_interval([values[seed] - reference[seed] for seed in seeds]) if seeds else None
