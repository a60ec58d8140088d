"""Groups of rows of similar length, so that padding stays small."""

from __future__ import annotations

from typing import Final

import numpy

# Tokens of padding that cost about as much as another pass over a batch.
GROUP_COST: Final = 96


def grouped_by_length(lengths: numpy.ndarray, group_cost: int = GROUP_COST) -> list[numpy.ndarray]:
    """Return indices of `lengths` [items] in groups of similar length, the shortest first.

    They minimize the padding of all groups to their longest item, plus `group_cost` tokens per group; items of a group
    are in their given order.

    >>> import numpy
    >>> [group.tolist() for group in grouped_by_length(numpy.array([500, 20, 490, 24]))]
    [[1, 3], [0, 2]]
    """
    order = numpy.argsort(lengths, kind="stable")
    ordered = lengths[order]
    # best[k] is the cost of the k shortest items; a group is a range of them.
    best = numpy.zeros(len(ordered) + 1)
    begins = numpy.zeros(len(ordered) + 1, dtype=numpy.int64)
    for stop in range(1, len(ordered) + 1):
        costs = best[:stop] + ordered[stop - 1] * (stop - numpy.arange(stop)) + group_cost
        begins[stop] = int(costs.argmin())
        best[stop] = costs[begins[stop]]
    groups = []
    stop = len(ordered)
    while stop:
        groups.append(numpy.sort(order[begins[stop] : stop]))
        stop = int(begins[stop])
    return groups[::-1]
