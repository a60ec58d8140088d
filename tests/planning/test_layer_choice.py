"""Budgets, guards and strategies of a choice of layers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.mapping_file.layer_choice import LayerStrategy
from xarch_kd.planning.layer_choice import (
    Key,
    LayerSelection,
    choose_kept,
    kept_count,
    ranks,
    unmeasured_kept,
    with_count,
)

SCORES = [9.0, 8.0, 1.0, 3.0, 2.0, 7.0, 7.0, 0.5]


@pytest.mark.parametrize(
    ("budget", "key", "layers", "kept"),
    [
        (3, "keep_attention", 8, 3),
        (3, "replace", 8, 5),
        (0.25, "keep_attention", 8, 2),
        (0.3, "replace", 8, 6),
        (0.5, "replace", 3, 1),
    ],
)
def test_budgets(budget: float, key: Key, layers: int, kept: int) -> None:
    assert kept_count(LayerStrategy(budget=budget), key, layers) == kept


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, (0, 1, 6)),
        ({"spacing": 2}, (0, 3, 6)),
        ({"always": (7,)}, (0, 1, 7)),
        ({"never": (0, 6)}, (1, 3, 5)),
        ({"never": (6,), "spacing": 2}, (0, 3, 5)),
    ],
    ids=["free", "spacing", "always", "never", "never-and-spacing"],
)
def test_the_greatest_scores_that_the_guards_allow(options: dict[str, Any], kept: tuple[int, ...]) -> None:
    # Blocks 5 and 6 have the same score; of 0 and 1 the second is too near with a spacing of 2.
    assert choose_kept(LayerStrategy(budget=3, **options), "keep_attention", 8, SCORES) == kept


def test_guards_are_of_the_layers_that_the_key_names() -> None:
    strategy = LayerStrategy(budget=5, always=(0,), never=(2,))
    assert choose_kept(strategy, "replace", 8, SCORES) == (1, 2, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 8}, "leaves nothing to choose"),
        ({"budget": 0.01}, "leaves nothing to choose"),
        ({"budget": 3, "always": (9,)}, "always has a block that the model lacks"),
        ({"budget": 2, "always": (1, 2, 3)}, "does not fit always and never"),
        ({"budget": 7, "never": (1, 2)}, "does not fit always and never"),
        ({"budget": 4, "spacing": 4}, "Too few blocks are far enough"),
        ({"budget": 2, "always": (1, 2), "spacing": 2}, "Too few blocks are far enough"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_kept(LayerStrategy(**options), "keep_attention", 8, SCORES)


def test_strategies_without_measurements() -> None:
    uniform = LayerStrategy(strategy="uniform", budget=4)
    assert unmeasured_kept(uniform, "keep_attention", 8, seed=0) == (1, 3, 5, 7)
    guarded = LayerStrategy(strategy="uniform", budget=3, always=(0,), never=(1,))
    assert unmeasured_kept(guarded, "keep_attention", 8, seed=0) == (0, 3, 6)
    random = LayerStrategy(strategy="random", budget=4, spacing=2, seed=5)
    drawn = unmeasured_kept(random, "keep_attention", 9, seed=0)
    assert drawn == unmeasured_kept(random, "keep_attention", 9, seed=1)
    assert all(after - before >= 2 for before, after in pairwise(drawn))
    others = {unmeasured_kept(LayerStrategy(strategy="random", budget=4), "replace", 9, seed=seed) for seed in range(4)}
    assert len(others) > 1


def test_both_is_the_mean_of_two_ranks() -> None:
    found = ranks({"kl": [1.0, 5.0, 3.0], "recall": [9.0, -1.0, 2.0]}, "both")
    assert found == [1.0, 1.0, 1.0]
    assert ranks({"kl": [1.0, 5.0, 3.0], "recall": [0.0, 2.0, 1.0]}, "both") == [0.0, 2.0, 1.0]


def test_a_damaged_selection_is_refused() -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        LayerSelection.from_dict({"kept": [1.5]})


def of_cache(size: str, context: int = 100) -> LayerStrategy:
    return LayerStrategy.model_validate({"budget": {"cache_bytes": size, "at_context": context}})


def test_bytes_of_cache_become_a_number_of_layers() -> None:
    # 8 layers: 1,000 bytes of attention or 100 of a state each, so that k layers of attention take 800 + 900 k.
    for size, kept in (("1700 B", 1), ("2599B", 1), ("2600B", 2), ("7.05 KiB", 7)):
        assert with_count(of_cache(size), "keep_attention", 8, 1000, 100).budget == kept
        assert with_count(of_cache(size), "replace", 8, 1000, 100).budget == 8 - kept


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ("799 B", "recurrent states of all layers alone take 800 bytes"),
        ("1699 B", "not even one layer of attention fits"),
        ("1 GiB", "every layer may keep its attention"),
    ],
)
def test_bytes_that_leave_nothing_to_choose(size: str, found: str) -> None:
    with pytest.raises(UsageError) as caught:
        with_count(of_cache(size), "replace", 8, 1000, 100)
    assert str(caught.value.found) == found
    assert "1,700 bytes" in str(caught.value.allowed)
