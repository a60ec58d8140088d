"""Paired bootstrap intervals for differences between two models on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xarch_kd.errors import UsageError

RESAMPLES = 2000
LEVEL = 0.95
# Bound on clusters drawn at a time, so that memory does not grow with resamples × rows.
DRAWS_AT_A_TIME = 4 << 20


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean of second - first over tokens, in nats, with a bootstrap interval over clusters of tokens.

    `low` and `high` bound the central `level` of the resampled means, and `p_value` is two-sided for a difference of
    0 (1 for identical models). All three are None for fewer than two clusters, which allow no estimate.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    level: float
    resamples: int
    clusters: int


def paired_bootstrap(
    first: Tensor,
    second: Tensor,
    *,
    clusters: Sequence[int | str] | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> PairedDifference:
    """Return the mean difference second - first of per-token values [rows, tokens], resampling whole clusters.

    Tokens that are NaN for both models do not count, and neither do rows without another token.

    Tokens of one row share a context, so rows are drawn with replacement, or clusters of rows if `clusters` gives one
    label per row (its document, for example), with the values of both models together. The interval is the percentile
    interval. The p-value is 2 (n + 1) / (resamples + 1), at most 1, with n the resamples on the other side of 0.

    Raises UsageError for shapes that differ or are empty, another number of labels than of rows, a level outside of
    0 to 1 and no resample.
    """
    if first.shape != second.shape or first.dim() != 2 or first.numel() == 0:
        raise UsageError(
            "A paired difference needs both models' values of the same tokens.",
            found=f"{list(first.shape)} and {list(second.shape)}",
            allowed="two equal shapes [rows, tokens], not empty",
        )
    if not 0 < level < 1 or resamples < 1:
        raise UsageError(
            "The interval cannot be computed.",
            found=f"level {level}, {resamples} resamples",
            allowed="0 < level < 1, >= 1 resamples",
        )
    tokens = (~first.isnan()).sum(1).double().numpy()
    difference = (second.double() - first.double()).nansum(1).numpy()
    sums, counts = _by_cluster(difference, tokens, clusters)
    if not counts.any() or not torch.equal(first.isnan(), second.isnan()):
        raise UsageError("A paired difference needs both models' values of the same tokens.", found="other NaN values")
    sums, counts = sums[counts > 0], counts[counts > 0]
    mean = float(sums.sum() / counts.sum())
    low = high = p_value = None
    if len(sums) > 1:
        means = _resampled_means(sums, counts, resamples, seed)
        low, high = (float(bound) for bound in np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))
        extreme = min(int((means <= 0).sum()), int((means >= 0).sum()))
        p_value = min(1.0, 2 * (extreme + 1) / (resamples + 1))
    return PairedDifference(
        mean=mean, low=low, high=high, p_value=p_value, level=level, resamples=resamples, clusters=len(sums)
    )


def _by_cluster(
    difference: NDArray[np.float64], tokens: NDArray[np.float64], clusters: Sequence[int | str] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sum of differences and the number of tokens of each cluster."""
    if clusters is None:
        return difference, tokens
    if len(clusters) != len(difference):
        raise UsageError("clusters needs one label per row.", found=len(clusters), allowed=len(difference))
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=difference).astype(np.float64)
    return sums, np.bincount(index, weights=tokens).astype(np.float64)


def _resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    step = max(1, DRAWS_AT_A_TIME // len(sums))
    parts = []
    for start in range(0, resamples, step):
        drawn = generator.integers(len(sums), size=(min(step, resamples - start), len(sums)))
        parts.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(parts)
