"""Token-mixing matrices, stored as factors and never as time × time tensors."""

from __future__ import annotations

from xarch_kd.mixing.banded import BandedMixing
from xarch_kd.mixing.base import DENSE_LIMIT, Mixing
from xarch_kd.mixing.delta import DeltaMixing
from xarch_kd.mixing.linear import LinearMixing
from xarch_kd.mixing.selective import SelectiveMixing
from xarch_kd.mixing.softmax import SoftmaxMixing
from xarch_kd.mixing.ssd import SSDMixing

__all__ = [
    "DENSE_LIMIT",
    "BandedMixing",
    "DeltaMixing",
    "LinearMixing",
    "Mixing",
    "SSDMixing",
    "SelectiveMixing",
    "SoftmaxMixing",
]
