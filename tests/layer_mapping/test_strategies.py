from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping import STRATEGIES, LearnedMap, build_layer_map, strategy_named
from xarch_kd.layer_mapping.counts import every, uniform

SIMILARITY = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.0, 0.0, 0.2, 0.7]])
KNOWN: Mapping[str, Any] = {
    "replaced_layers": (1,),
    "student_kinds": ("mamba2", "attention"),
    "teacher_kinds": ("attention",) * 4,
    "similarity": SIMILARITY,
}


def test_the_table_says_what_each_strategy_needs() -> None:
    by_need: dict[str, list[str]] = {}
    for name, strategy in STRATEGIES.items():
        by_need.setdefault(strategy.needs, []).append(name)
    counts = "same replaced uniform uniform_endpoints uniform_begin first last every block_average reverse all_to_one"
    assert by_need == {
        "counts": [*counts.split(), "random"],
        "types": ["type_aware"],
        "similarity": ["cka", "monotone", "optimal_transport"],
        "training": ["learned"],
    }


def test_options_are_the_keyword_arguments() -> None:
    assert strategy_named("every").options == ("k",)
    assert strategy_named("uniform").options == ()
    assert strategy_named("random").options == ("seed", "draw", "ordered")
    assert strategy_named("monotone").options == ("strict", "band", "last_to_last")


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"same", "replaced", "every"}))
def test_every_strategy_makes_a_map_of_its_name_from_what_is_known(name: str) -> None:
    layer_map = build_layer_map(name, 2, 4, **KNOWN)
    assert layer_map.strategy == name
    assert layer_map.weights.shape == (2, 4)
    assert layer_map.weights.sum(1).tolist() == pytest.approx([1, 1])
    assert layer_map.text_plot().startswith(name)


def test_options_and_what_is_known_reach_the_strategy() -> None:
    assert build_layer_map("every", 2, 4, options={"k": 1}).pairs() == every(2, 4, k=1).pairs()
    assert build_layer_map("replaced", 4, 4, **KNOWN).pairs() == ((1, 1, 1.0),)
    assert build_layer_map("same", 4, 4, **KNOWN).pairs() == uniform(4, 4).pairs()
    assert build_layer_map("cka", 2, 4, similarity=SIMILARITY).pairs() == ((0, 0, 1.0), (1, 3, 1.0))
    by_cost = build_layer_map("optimal_transport", 2, 4, options={"cost": 1 - SIMILARITY})
    assert by_cost.pairs() == build_layer_map("optimal_transport", 2, 4, similarity=SIMILARITY).pairs()
    # A cost replaces the measured similarity.
    assert build_layer_map("optimal_transport", 2, 4, **KNOWN, options={"cost": SIMILARITY}).pairs() != by_cost.pairs()
    assert build_layer_map("type_aware", 2, 4, **KNOWN).pairs() == ((0, 1, 1.0), (1, 3, 1.0))
    learned = build_layer_map("learned", 2, 4, options={"initial": uniform(2, 4)})
    assert learned.weights.argmax(1).tolist() == [1, 3]
    assert isinstance(strategy_named("learned").function(2, 4), LearnedMap)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("unifrom", {}, r"unknown strategy. Did you mean 'uniform'\?[\s\S]*asked: +unifrom[\s\S]*same \| replaced"),
        ("every", {"options": {"step": 2}}, r"every has no such option[\s\S]*step[\s\S]*allowed: +k"),
        ("uniform", {"options": {"k": 2}}, r"allowed: +none"),
        ("random", {"options": {"sed": 2}}, r"Did you mean 'seed'\?"),
        ("every", {}, "every needs the option k"),
        ("replaced", {}, r"as many student layers as teacher layers"),
        ("type_aware", {}, "needs the kinds of the mixers"),
        ("cka", {}, r"needs a similarity[\s\S]*calibration pass"),
        ("optimal_transport", {}, "needs a similarity"),
        ("cka", {"similarity": SIMILARITY.T}, r"the similarity that cka reads[\s\S]*\[4, 2\][\s\S]*\[2, 4\]"),
        ("optimal_transport", {"options": {"cost": SIMILARITY.T}}, "the cost that optimal_transport reads"),
        ("optimal_transport", {"options": {"cost": [[1]]}}, "found: +list"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_layer_map(name, 2, 4, **arguments)
