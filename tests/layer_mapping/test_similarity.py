from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping import LayerMap
from xarch_kd.layer_mapping.similarity import cka, monotone


def chosen(layer_map: LayerMap) -> list[int]:
    return layer_map.weights.argmax(1).tolist()


def searched(similarity: Tensor, strict: bool, band: float | None, last_to_last: bool) -> list[int] | None:
    """The best of all maps, one by one; 1-based places and floating-point fractions, as they are written."""
    students, teachers = similarity.shape
    best: tuple[float, list[int]] | None = None
    for targets in product(range(teachers), repeat=students):
        steps = [after - before for before, after in pairwise(targets)]
        fits = all(step >= (1 if strict else 0) for step in steps)
        fits &= not last_to_last or targets[-1] == teachers - 1
        if band is not None:
            places = enumerate(targets, 1)
            fits &= all(abs(place + 1 - own * teachers / students) <= band + 1e-9 for own, place in places)
        if fits:
            total = sum(similarity[own, place].item() for own, place in enumerate(targets))
            if best is None or total > best[0]:
                best = total, list(targets)
    return None if best is None else best[1]


SIZES = [(1, 1), (1, 4), (2, 2), (2, 5), (3, 4), (4, 6), (3, 3), (4, 2), (5, 3)]


@pytest.mark.parametrize(("students", "teachers"), SIZES)
def test_monotone_is_the_best_of_all_maps(students: int, teachers: int) -> None:
    generator = torch.Generator().manual_seed(students * 10 + teachers)
    refused = 0
    for _ in range(3):
        # Continuous entries: no two maps have the same total.
        similarity = torch.randn(students, teachers, generator=generator, dtype=torch.float64)
        for strict, band, last_to_last in product((True, False), (None, 0.5, 1.0, 2.0), (True, False)):
            if strict and students > teachers:
                continue
            expected = searched(similarity, strict, band, last_to_last)
            if expected is None:
                refused += 1
                with pytest.raises(UsageError, match="no map within the band"):
                    monotone(similarity, strict=strict, band=band, last_to_last=last_to_last)
            else:
                found = monotone(similarity, strict=strict, band=band, last_to_last=last_to_last)
                assert chosen(found) == expected, (strict, band, last_to_last)
    # Only a deeper student can have no teacher layer within half a block.
    assert refused == 0 or students > teachers


def test_monotone_by_hand() -> None:
    # The maximum of each row would not be monotone (2, 0, 1).
    similarity = torch.tensor([[0.0, 0.1, 0.9, 0.0], [0.8, 0.0, 0.2, 0.1], [0.0, 0.9, 0.0, 0.3]])
    assert chosen(cka(similarity)) == [2, 0, 1]
    assert chosen(monotone(similarity)) == [1, 2, 3]
    assert chosen(monotone(similarity, strict=False)) == [2, 2, 3]
    assert chosen(monotone(similarity, strict=False, last_to_last=False)) == [0, 0, 1]


def test_a_band_of_one_block_always_leaves_a_map() -> None:
    for students, teachers in product(range(1, 13), range(1, 13)):
        for strict in (True, False):
            if not strict or students <= teachers:
                found = monotone(torch.zeros(students, teachers), band=1.0, strict=strict)
                assert found.weights.shape == (students, teachers)
                assert len(found.pairs()) == students


def test_cka_takes_the_first_of_equals() -> None:
    assert chosen(cka(torch.tensor([[0.2, 0.7, 0.7], [-0.1, -0.2, -0.3]]))) == [1, 0]


BAD = torch.tensor([[0.0, 1.0], [float("nan"), 0.5]])


@pytest.mark.parametrize("strategy", [cka, monotone])
@pytest.mark.parametrize(
    ("similarity", "message"),
    [
        (torch.zeros(3), r"a matrix of layers[\s\S]*\[3\]"),
        (torch.zeros(0, 3), "at least one layer"),
        (BAD, "not finite[\\s\\S]*nan of student layer 1 and teacher layer 0"),
        (-BAD / 0, "not finite"),
    ],
)
def test_what_is_no_similarity_is_refused(
    strategy: Callable[[Tensor], LayerMap], similarity: Tensor, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        strategy(similarity)


def test_monotone_refuses_what_it_cannot_place() -> None:
    with pytest.raises(UsageError, match=r"monotone cannot place[\s\S]*5 student layers[\s\S]*fix: +strict: false"):
        monotone(torch.zeros(5, 4))
    with pytest.raises(UsageError, match=r"no map within the band[\s\S]*band: 0.1[\s\S]*wider"):
        monotone(torch.zeros(2, 3), band=0.1)
    for band in (-1.0, float("nan")):
        with pytest.raises(UsageError, match=r"band of monotone[\s\S]*>= 0"):
            monotone(torch.zeros(2, 3), band=band)
