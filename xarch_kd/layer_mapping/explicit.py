"""Layer map given as an explicit list of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping.counts import check_range
from xarch_kd.layer_mapping.layer_map import LayerMap, check_depths

Pair = tuple[int, int] | tuple[int, int, float]


def explicit(pairs: Sequence[Pair], student_layers: int, teacher_layers: int) -> LayerMap:
    """Return the map of `pairs` (student, teacher) or (student, teacher, weight), layers counted from 0.

    A student layer may have several teacher layers: their weights (1 by default) are divided by their sum. Several
    student layers may share a teacher layer. Layers that are in no pair are not matched.

    Raises UsageError for an empty list, a layer out of range, a duplicate pair, or a weight that is not positive.

    >>> from xarch_kd.layer_mapping import explicit
    >>> explicit([(0, 1), (1, 3)], 2, 4).pairs()
    ((0, 1, 1.0), (1, 3, 1.0))
    """
    check_depths("explicit pairs", student_layers, teacher_layers)
    if not pairs:
        raise UsageError("layers: the list of pairs is empty, so nothing would be matched")
    check_range("student", [pair[0] for pair in pairs], student_layers)
    check_range("teacher", [pair[1] for pair in pairs], teacher_layers)
    layers = [(pair[0], pair[1]) for pair in pairs]
    twice = sorted({pair for pair in layers if layers.count(pair) > 1})
    if twice:
        raise UsageError(f"layer pairs (student, teacher) given twice: {', '.join(map(str, twice))}")
    weights = torch.zeros(student_layers, teacher_layers, dtype=torch.float64)
    for pair in pairs:
        weight = pair[2] if len(pair) == 3 else 1.0
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(
                f"the weight of the layer pair (student, teacher) {pair[:2]} is not above 0",
                found=weight,
                allowed="finite and > 0",
                fix="leave a pair out that should not be matched",
            )
        weights[pair[0], pair[1]] = weight
    totals = weights.sum(1, keepdim=True)
    return LayerMap("explicit", weights / totals.where(totals > 0, 1))
