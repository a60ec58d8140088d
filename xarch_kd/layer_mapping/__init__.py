"""Layer maps: how much each student block learns from each teacher block."""

from __future__ import annotations

from xarch_kd.layer_mapping.explicit import explicit
from xarch_kd.layer_mapping.layer_map import LayerMap, Pairs, similarity_picture
from xarch_kd.layer_mapping.learned import LearnedMap, LearnedMatch
from xarch_kd.layer_mapping.strategies import STRATEGIES, Strategy, build_layer_map, strategy_named
from xarch_kd.layer_mapping.transport import transport_plan

__all__ = [
    "STRATEGIES",
    "LayerMap",
    "LearnedMap",
    "LearnedMatch",
    "Pairs",
    "Strategy",
    "build_layer_map",
    "explicit",
    "similarity_picture",
    "strategy_named",
    "transport_plan",
]
