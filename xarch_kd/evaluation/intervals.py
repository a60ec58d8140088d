"""Intervals and tests for any statistic of prompts, and for comparisons of several runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from xarch_kd.errors import UsageError
from xarch_kd.evaluation.statistics import LEVEL, RESAMPLES

Array = NDArray[np.float64]
# Share of the units that one subsample of a pairwise statistic has.
SUBSAMPLE: Final = 0.5
SUBSAMPLES: Final = 200
# Of the minimum detectable effect.
POWER: Final = 0.8


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with a bootstrap interval and a two-sided p-value; the last three are None for fewer than two units."""

    value: float
    low: float | None
    high: float | None
    p_value: float | None


def resampled_weights(
    units: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: Sequence[int | str] | None = None,
    strata: Sequence[int] = (),
) -> Array:
    """Return how often each unit is in each bootstrap resample [resamples, units].

    Units are drawn with replacement. With `groups`, one label per unit (the training seed of a prompt's run), groups
    are drawn first and then units of each drawn group, so that prompts of one seed do not count as independent runs.
    With `strata`, numbers of consecutive units, units are drawn within each stratum.

    >>> from xarch_kd.evaluation.intervals import resampled_weights
    >>> resampled_weights(3, resamples=4).sum(1).tolist()
    [3.0, 3.0, 3.0, 3.0]
    """
    if strata:
        parts = enumerate(strata)
        return np.hstack([resampled_weights(size, resamples=resamples, seed=seed + place) for place, size in parts])
    generator = np.random.default_rng(seed)
    if groups is None:
        return _counts(generator.integers(units, size=(resamples, units)), units)
    if len(groups) != units:
        raise UsageError("groups needs one label per unit.", found=len(groups), allowed=units)
    _, index, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    members = np.zeros((len(sizes), sizes.max()), dtype=np.int64)
    for group, size in enumerate(sizes):
        members[group, :size] = np.flatnonzero(index == group)
    weights = np.zeros((resamples, units))
    for _ in range(len(sizes)):
        drawn = generator.integers(len(sizes), size=(resamples, 1))
        places = (generator.random((resamples, members.shape[1])) * sizes[drawn]).astype(np.int64)
        # A group smaller than the largest leaves the last places out: they count in a column of their own.
        chosen = np.where(np.arange(members.shape[1]) < sizes[drawn], members[drawn, places], units)
        weights += _counts(chosen, units + 1)[:, :units]
    return weights


def _counts(drawn: NDArray[np.int64], units: int) -> Array:
    """Return how often each unit is in each row of `drawn` [resamples, draws]."""
    rows = np.arange(len(drawn))[:, None] * units
    return np.bincount((drawn + rows).ravel(), minlength=len(drawn) * units).reshape(-1, units).astype(np.float64)


def bootstrap(
    statistic: Callable[[Array], Array],
    units: int,
    *,
    null: float = 0.0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: Sequence[int | str] | None = None,
    strata: Sequence[int] = (),
) -> list[Interval]:
    """Return the percentile intervals of a statistic, one for each of its values.

    `statistic` maps weights [resamples, units] to values [resamples, values]. The p-value is that of `null`,
    2 (n + 1) / (resamples + 1) and at most 1, with n the resamples on its other side; values that never differ from it
    have p = 1. `groups` and `strata` are those of `resampled_weights`. Raises UsageError for no unit, no resample and a
    level outside of 0 to 1.

    >>> import numpy as np
    >>> from xarch_kd.evaluation.intervals import bootstrap
    >>> differences = np.array([0.1, 0.3, 0.2, 0.4])
    >>> found, = bootstrap(lambda weights: (weights @ differences / weights.sum(1))[:, None], 4)
    >>> round(found.value, 3), found.low > 0.1, found.p_value < 0.01
    (0.25, True, True)
    """
    if units < 1 or resamples < 1 or not 0 < level < 1:
        raise UsageError(
            "The interval cannot be computed.",
            found=f"{units} units, {resamples} resamples, level {level}",
            allowed="at least one unit and one resample, 0 < level < 1",
        )
    values = statistic(np.ones((1, units)))[0]
    if units < 2 or (groups is not None and len(set(groups)) < 2):
        return [Interval(value=float(value), low=None, high=None, p_value=None) for value in values]
    drawn = statistic(resampled_weights(units, resamples=resamples, seed=seed, groups=groups, strata=strata))
    return [
        _interval(float(value), column[np.isfinite(column)], null, level)
        for value, column in zip(values, drawn.T, strict=True)
    ]


def _interval(value: float, drawn: Array, null: float, level: float) -> Interval:
    if not len(drawn):
        return Interval(value=value, low=None, high=None, p_value=None)
    low, high = (float(bound) for bound in np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]))
    extreme = min(int((drawn <= null).sum()), int((drawn >= null).sum()))
    return Interval(value=value, low=low, high=high, p_value=min(1.0, 2 * (extreme + 1) / (len(drawn) + 1)))


def subsampling(
    statistic: Callable[[NDArray[np.int64]], Array],
    units: int,
    *,
    share: float = SUBSAMPLE,
    draws: int = SUBSAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> list[Interval]:
    """Return intervals of a statistic of pairs of units, by m-out-of-n subsampling without replacement.

    `statistic` maps indices [m] to values. A bootstrap would compare units with copies of themselves. Deviations of the
    subsamples from their mean are scaled by sqrt(m / (n - m)), which makes the variance that of a mean of n units
    (Politis, Romano and Wolf, Subsampling, 1999, with the correction for a finite population), around the value of all
    units. Fewer than 8 units and no draws have no interval.

    >>> import numpy as np
    >>> from xarch_kd.evaluation.intervals import subsampling
    >>> values = np.random.default_rng(0).normal(size=400)
    >>> found, = subsampling(lambda index: np.array([values[index].mean()]), 400)
    >>> abs((found.high - found.low) / (2 * 1.96 * values.std() / 20) - 1) < 0.2
    True
    """
    everything = statistic(np.arange(units))
    if units < 8 or not draws:
        return [Interval(value=float(value), low=None, high=None, p_value=None) for value in everything]
    size = max(2, round(share * units))
    generator = np.random.default_rng(seed)
    drawn = np.stack([statistic(np.sort(generator.permutation(units)[:size])) for _ in range(draws)])
    spread = (drawn - drawn.mean(0)) * math.sqrt(size / (units - size))
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2], axis=0)
    # A statistic that hardly ever differs has quantiles on one side of its mean.
    bounds = np.minimum(low, 0.0), np.maximum(high, 0.0)
    return [
        Interval(value=float(value), low=float(value + low), high=float(value + high), p_value=None)
        for value, low, high in zip(everything, *bounds, strict=True)
    ]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values of a family of tests, adjusted by Holm's step-down method, by name.

    >>> from xarch_kd.evaluation.intervals import holm
    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def recovery(
    student: Array, baseline: Array, teacher: Array, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return (student - baseline) / (teacher - baseline), each the mean of values [prompts] of the same prompts.

    Raises UsageError if the interval of the denominator includes 0: then there is nothing to recover.

    >>> import numpy as np
    >>> from xarch_kd.evaluation.intervals import recovery
    >>> noise = np.random.default_rng(0).normal(size=(3, 200)) / 10
    >>> found = recovery(noise[0] + 0.75, noise[1], noise[2] + 1.0)
    >>> round(found.value, 1), found.low < 0.75 < found.high
    (0.7, True)
    """
    units = len(teacher)
    if not len(student) == len(baseline) == units:
        raise UsageError(
            "A recovery ratio needs values of the same prompts.",
            found=f"{len(student)}, {len(baseline)} and {units} values",
        )
    (gap,) = bootstrap(
        lambda weights: _means(weights, teacher - baseline), units, level=level, resamples=resamples, seed=seed
    )
    if gap.low is None or gap.high is None or gap.low <= 0 <= gap.high:
        raise UsageError(
            "There is no recovery ratio: the teacher may not differ from the baseline.",
            found=f"teacher - baseline {gap.value:+.4g}, {level:.0%} interval "
            + ("unknown" if gap.low is None or gap.high is None else f"{gap.low:+.4g} to {gap.high:+.4g}"),
            allowed="an interval without 0",
            fix="measure on more prompts, or report the differences themselves",
        )
    (found,) = bootstrap(
        lambda weights: _means(weights, student - baseline) / _means(weights, teacher - baseline),
        units,
        level=level,
        resamples=resamples,
        seed=seed,
    )
    return found


def _means(weights: Array, values: Array) -> Array:
    return (weights @ values / weights.sum(1))[:, None]


def win_and_tie_curve(
    student: Sequence[float], teacher: Sequence[float], tolerances: Sequence[float]
) -> tuple[float, ...]:
    """Return the share of tasks on which the student is at most `tolerance` below the teacher, for each tolerance.

    Scores are higher for better models, one per task. The whole curve is reported, because a single tolerance can be
    chosen to favor a model. Raises UsageError for unequal or empty scores and a negative tolerance.

    >>> from xarch_kd.evaluation.intervals import win_and_tie_curve
    >>> win_and_tie_curve([0.5, 0.7, 0.2], [0.5, 0.75, 0.4], [0.0, 0.1, 0.2])
    (0.3333333333333333, 0.6666666666666666, 1.0)
    """
    if len(student) != len(teacher) or not student or min(tolerances, default=0.0) < 0:
        raise UsageError(
            "The curve needs one score of each model per task and tolerances of at least 0.",
            found=f"{len(student)} and {len(teacher)} scores, tolerances {', '.join(map(str, tolerances))}",
        )
    shortfall = np.asarray(teacher, dtype=np.float64) - np.asarray(student, dtype=np.float64)
    # A difference that is the tolerance up to rounding is a tie.
    slack = 1e-9 * max(1.0, float(np.abs(shortfall).max()))
    return tuple(float((shortfall <= tolerance + slack).mean()) for tolerance in tolerances)


def minimum_detectable_effect(differences: Array, *, level: float = LEVEL, power: float = POWER) -> float | None:
    """Return the difference that a paired comparison of as many units would find with probability `power`.

    It is (z of the level + z of the power) standard errors of the mean of `differences` [units]; None for fewer than
    two units.

    >>> import numpy as np
    >>> from xarch_kd.evaluation.intervals import minimum_detectable_effect
    >>> round(minimum_detectable_effect(np.array([1.0, -1.0] * 50)), 3)
    0.282
    """
    if len(differences) < 2:
        return None
    normal = NormalDist()
    deviations = normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)
    return float(deviations * np.std(differences, ddof=1) / math.sqrt(len(differences)))
