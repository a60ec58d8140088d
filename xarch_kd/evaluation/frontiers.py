"""Comparisons of two sets of texts by their features: divergence frontier, precision, recall, density, coverage."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Of the divergence frontier (Pillutla et al., arXiv 2102.01454, and its package): scale of the exponent, mixture
# weights, and clusters per feature vector of both sets.
SCALE: Final = 5.0
WEIGHTS: Final = 25
CLUSTER_SHARE: Final = 0.1
RESTARTS: Final = 3
ROUNDS: Final = 25
NEIGHBORS: Final = 5


def clusters(vectors: Array, number: int, seed: int) -> NDArray[np.int64]:
    """Return the cluster of each vector [vectors] by k-means from several k-means++ starts, the best of them."""
    best, found = np.inf, np.zeros(len(vectors), dtype=np.int64)
    squares = (vectors**2).sum(1)
    for restart in range(RESTARTS):
        generator = np.random.default_rng([seed, restart])
        centers = vectors[[generator.integers(len(vectors))]]
        nearest = np.full(len(vectors), np.inf)
        for _ in range(number - 1):
            gap = squares - 2 * vectors @ centers[-1] + (centers[-1] ** 2).sum()
            nearest = np.minimum(nearest, np.maximum(gap, 0))
            if nearest.sum() <= 1e-12:
                break
            centers = np.vstack([centers, vectors[generator.choice(len(vectors), p=nearest / nearest.sum())]])
        labels = np.zeros(len(vectors), dtype=np.int64)
        distance = squares[:, None] - 2 * vectors @ centers.T + (centers**2).sum(1)
        for turn in range(ROUNDS):
            new = distance.argmin(1)
            if np.array_equal(new, labels) and turn > 0:
                break
            labels = new
            for cluster in range(len(centers)):
                members = vectors[labels == cluster]
                if len(members):
                    centers[cluster] = members.mean(0)
            distance = squares[:, None] - 2 * vectors @ centers.T + (centers**2).sum(1)
        inertia = float(np.maximum(distance[np.arange(len(vectors)), labels], 0).sum())
        if inertia < best:
            best, found = inertia, labels
    return found


def frontier(p: Array, q: Array) -> tuple[Array, Array]:
    """Return the divergence curve of two histograms: exp(-c KL(q ‖ r)) and exp(-c KL(p ‖ r)) for r between them."""
    first, second = [], []
    for weight in np.linspace(1e-6, 1 - 1e-6, WEIGHTS):
        mixture = weight * p + (1 - weight) * q
        first.append(np.exp(-SCALE * _kl(q, mixture)))
        second.append(np.exp(-SCALE * _kl(p, mixture)))
    return np.array([0.0, *sorted(first), 1.0]), np.array([1.0, *sorted(second, reverse=True), 0.0])


def area(x: Array, y: Array) -> float:
    """Return the area under a divergence curve, the mean of both orders of its axes."""
    return float(0.5 * (np.trapezoid(y, x) + np.trapezoid(x[::-1], y[::-1])))


def histograms(real: Array, other: Array, seed: int) -> tuple[Array, Array]:
    """Return the histograms of two sets of feature vectors over clusters of both.

    Half an observation is added to each cluster (Krichevsky and Trofimov), which lowers the bias of small sets.
    """
    number = max(2, round(CLUSTER_SHARE * (len(real) + len(other))))
    labels = clusters(np.vstack([real, other]), number, seed)
    sets = (labels[: len(real)], labels[len(real) :])
    first, second = (np.bincount(part, minlength=number) + 0.5 for part in sets)
    return first / first.sum(), second / second.sum()


def _kl(p: Array, q: Array) -> float:
    used = p > 0
    return float((p[used] * np.log(p[used] / q[used])).sum())


def neighbor_measures(real: Array, other: Array, neighbors: int = NEIGHBORS) -> dict[str, float]:
    """Return precision, recall (Kynkäänniemi et al., arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    A ball around each vector reaches its k-th nearest other vector of the same set. Precision is the share of `other`
    in a ball of `real`, recall that of `real` in a ball of `other`; density counts the balls of `real` around each of
    `other`, over k; coverage is the share of balls of `real` with one of `other` in them.

    >>> import numpy as np
    >>> from xarch_kd.evaluation.frontiers import neighbor_measures
    >>> points = np.random.default_rng(0).normal(size=(20, 3))
    >>> neighbor_measures(points, points)["precision"], neighbor_measures(points, points + 100)["coverage"]
    (1.0, 0.0)
    """
    k = min(neighbors, len(real) - 1, len(other) - 1)
    real_radius, other_radius = (np.sort(_distances(each, each), 1)[:, k] for each in (real, other))
    gap = _distances(real, other)
    slack = 1e-9
    inside = gap <= real_radius[:, None] + slack
    return {
        "precision": float(inside.any(0).mean()),
        "recall": float((gap <= other_radius[None] + slack).any(1).mean()),
        "density": float(inside.sum(0).mean() / k),
        "coverage": float(inside.any(1).mean()),
    }


def _distances(first: Array, second: Array) -> Array:
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.sqrt(np.maximum(squares, 0))
