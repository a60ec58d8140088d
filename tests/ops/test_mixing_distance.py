"""`mixing_distance` against formulas written anew in float64: every distance, pair of mixings and implementation."""

from __future__ import annotations

import pytest
import torch

from tests.ops.mixing_formulas import (
    DISTANCES,
    ROW_DISTANCES,
    SOFTMAX_PAIRS,
    SSD_PAIRS,
    compare,
    softmax_pair,
    some_mask,
    ssd_pair,
)


@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("pair", SOFTMAX_PAIRS)
def test_softmax_pairs(pair: str, distance: str, impl: str) -> None:
    teacher, student, head_map = softmax_pair(pair, torch.float64)
    compare(teacher, student, head_map, distance, impl, mask=some_mask())


@pytest.mark.parametrize("distance", ROW_DISTANCES)
@pytest.mark.parametrize("pair", SOFTMAX_PAIRS)
def test_softmax_pairs_by_panels(pair: str, distance: str) -> None:
    teacher, student, head_map = softmax_pair(pair, torch.float64)
    compare(teacher, student, head_map, distance, "panels", mask=some_mask())


@pytest.mark.parametrize("impl", ["reference", "streaming", "panels"])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
@pytest.mark.parametrize("pair", SSD_PAIRS)
def test_state_space_students(pair: str, distance: str, impl: str) -> None:
    teacher, student, head_map = ssd_pair(pair, torch.float64)
    compare(teacher, student, head_map, distance, impl, mask=some_mask())
