"""Intervals, tests and curves of comparisons: coverage by simulation, brute force, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from xarch_kd.errors import UsageError
from xarch_kd.evaluation.intervals import (
    Array,
    bootstrap,
    holm,
    minimum_detectable_effect,
    recovery,
    resampled_weights,
    subsampling,
    win_and_tie_curve,
)


def mean_interval(values: Array, seed: int, groups: list[int] | None = None) -> tuple[float, float]:
    (found,) = bootstrap(
        lambda weights: (weights @ values / weights.sum(1))[:, None],
        len(values),
        resamples=600,
        seed=seed,
        groups=groups,
    )
    assert found.low is not None and found.high is not None
    return found.low, found.high


def coverage(intervals: list[tuple[float, float]], truth: float = 0.0) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


# 300 repetitions: three errors of a share of 0.95 are 0.038.


def test_the_bootstrap_covers_the_mean_of_prompts() -> None:
    draws = np.random.default_rng(0).normal(size=(300, 60))
    assert 0.90 <= coverage([mean_interval(row, seed) for seed, row in enumerate(draws)]) <= 0.99


def test_prompts_of_one_seed_do_not_count_as_independent_runs() -> None:
    """Five seeds with an effect of their own, 12 prompts each: only the interval over seeds covers the mean.

    The percentile bootstrap of five units is too narrow by sqrt(4/5) and by Student's t (2.78 in place of 1.96), which
    leaves a coverage of P(|t4| < 1.96 sqrt(4/5)) = 0.85.
    """
    generator = np.random.default_rng(1)
    groups = [seed for seed in range(5) for _ in range(12)]
    nested, flat = [], []
    for repetition in range(200):
        row = np.repeat(generator.normal(size=5), 12) + generator.normal(size=60)
        nested.append(mean_interval(row, repetition, groups=groups))
        flat.append(mean_interval(row, repetition))
    assert 0.78 <= coverage(nested) <= 0.95
    assert coverage(flat) < 0.65


def test_resamples_of_groups_have_whole_groups() -> None:
    weights = resampled_weights(6, resamples=50, seed=0, groups=["a", "a", "b", "b", "c", "c"])
    sums = weights.reshape(50, 3, 2).sum(2)
    assert set(np.unique(sums)) <= {0.0, 2.0, 4.0, 6.0} and set(sums.sum(1)) == {6.0}


def test_groups_of_other_sizes_are_drawn_whole() -> None:
    weights = resampled_weights(4, resamples=400, seed=1, groups=["a", "b", "b", "b"])
    assert set(map(tuple, np.stack([weights[:, 0], weights[:, 1:].sum(1)], 1))) == {(2.0, 0.0), (1.0, 3.0), (0.0, 6.0)}
    assert weights[:, 1:].mean(0) == pytest.approx(np.ones(3), abs=0.2)


def test_identical_systems_have_p_1_and_one_prompt_has_no_interval() -> None:
    same = np.zeros(20)
    (found,) = bootstrap(lambda weights: (weights @ same / weights.sum(1))[:, None], 20)
    assert (found.value, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    (found,) = bootstrap(lambda weights: weights[:, :1], 1)
    assert (found.low, found.p_value) == (None, None)
    with pytest.raises(UsageError, match="0 < level < 1"):
        bootstrap(lambda weights: weights, 3, level=1.0)


def unique_pairs(index: np.ndarray, texts: np.ndarray) -> Array:
    """The share of pairs of texts that are equal: a statistic of pairs."""
    chosen = texts[index]
    equal = (chosen[:, None] == chosen[None]).sum() - len(chosen)
    return np.array([equal / (len(chosen) * (len(chosen) - 1))])


def test_subsamples_of_pairs_cover_what_a_bootstrap_does_not() -> None:
    """Texts of 8 kinds with unequal chances: copies of the same text make a bootstrap see pairs that are none."""
    generator = np.random.default_rng(2)
    chances = np.arange(1, 9) / 36
    truth = float((chances**2).sum())
    intervals, shifted = [], []
    for repetition in range(150):
        texts = generator.choice(8, size=60, p=chances)
        (found,) = subsampling(lambda index, texts=texts: unique_pairs(index, texts), 60, draws=100, seed=repetition)
        assert found.low is not None and found.high is not None
        intervals.append((found.low, found.high))
        drawn = [unique_pairs(generator.integers(60, size=60), texts)[0] for _ in range(20)]
        shifted.append(np.mean(drawn) - found.value)
    assert 0.88 <= coverage(intervals, truth) <= 0.995
    assert np.mean(shifted) > 0.01, "which is a 60th of what differs"


def test_a_subsampled_interval_holds_its_own_value() -> None:
    # Seven units are rarely all left out of a half: fewer than one draw in a hundred, so both quantiles are above it.
    def found_any(index: np.ndarray) -> Array:
        return np.array([float((index < 7).any())])

    (found,) = subsampling(found_any, 40, draws=100)
    assert found.low is not None and found.high is not None
    assert found.low <= found.value == 1.0 <= found.high
    assert found.high - found.low < 0.05


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """Holm rejects a hypothesis if Bonferroni rejects every set of hypotheses that it is in."""
    p_values = {"a": 0.001, "b": 0.02, "c": 0.04, "d": 0.5}
    adjusted = holm(p_values)
    for name in p_values:
        sets = [part for size in range(1, 5) for part in itertools.combinations(p_values, size) if name in part]
        worst = max(min(1.0, len(part) * min(p_values[other] for other in part)) for part in sets)
        assert adjusted[name] == pytest.approx(worst)


def test_a_recovery_ratio_without_a_gap_is_refused() -> None:
    noise = np.random.default_rng(3).normal(size=(3, 50))
    with pytest.raises(UsageError, match="teacher may not differ"):
        recovery(noise[0], noise[1], noise[2])
    with pytest.raises(UsageError, match="same prompts"):
        recovery(noise[0][:9], noise[1], noise[2])
    found = recovery(noise[0] / 10 + 0.5, noise[1] / 10, noise[2] / 10 + 1)
    assert found.low is not None and found.high is not None and found.low < 0.5 < found.high


def test_win_and_tie_and_the_detectable_effect() -> None:
    assert win_and_tie_curve([0.9, 0.1], [0.8, 0.3], [0.0, 0.2]) == (0.5, 1.0)
    with pytest.raises(UsageError, match="one score of each model"):
        win_and_tie_curve([0.1], [0.1, 0.2], [0.0])
    differences = np.random.default_rng(4).normal(size=100)
    effect = minimum_detectable_effect(differences)
    assert effect is not None
    # With that effect a two-sided z-test rejects in 80 % of samples; 2000 of them have an error of 0.9 %.
    draws = np.random.default_rng(5).normal(effect, differences.std(ddof=1), size=(2000, 100))
    z = draws.mean(1) / (differences.std(ddof=1) / 10)
    assert (z > 1.96).mean() == pytest.approx(0.8, abs=0.03)
    assert minimum_detectable_effect(np.zeros(1)) is None
