"""Layer maps: which teacher block each student block learns from."""

from __future__ import annotations

from xarch_kd.layer_mapping.fixed import STRATEGIES, explicit, replaced, same, uniform

__all__ = ["STRATEGIES", "explicit", "replaced", "same", "uniform"]
