"""Layer maps: the weight of each teacher layer in the loss of each student layer."""

from __future__ import annotations

from xarch_kd.layer_mapping.explicit import explicit
from xarch_kd.layer_mapping.layer_map import LayerMap, Pairs, similarity_text_plot
from xarch_kd.layer_mapping.learned import LearnedMap, LearnedMapLosses
from xarch_kd.layer_mapping.strategies import STRATEGIES, Strategy, build_layer_map, strategy_named
from xarch_kd.layer_mapping.transport import transport_plan

__all__ = [
    "STRATEGIES",
    "LayerMap",
    "LearnedMap",
    "LearnedMapLosses",
    "Pairs",
    "Strategy",
    "build_layer_map",
    "explicit",
    "similarity_text_plot",
    "strategy_named",
    "transport_plan",
]
