"""Adapters of recurrent mixers, by the name of the mixer's class."""

from __future__ import annotations

from typing import Final

from xarch_kd.taps.adapters.base import MixerAdapter
from xarch_kd.taps.adapters.convolution import SHORT_CONVOLUTION
from xarch_kd.taps.adapters.delta import KIMI_LINEAR, OLMO_HYBRID, QWEN3_5, QWEN3_NEXT
from xarch_kd.taps.adapters.lightning import LIGHTNING
from xarch_kd.taps.adapters.lru import RG_LRU
from xarch_kd.taps.adapters.mamba import MAMBA, ZAMBA
from xarch_kd.taps.adapters.mamba2 import MAMBA2
from xarch_kd.taps.adapters.mamba_ssm import MAMBA_SSM_ADAPTERS

__all__ = ["ADAPTERS", "MAMBA_SSM_ADAPTERS", "MixerAdapter"]

ADAPTERS: Final[dict[str, MixerAdapter]] = {
    "BambaMixer": MAMBA2,
    "Mamba2Mixer": MAMBA2,
    "GraniteMoeHybridMambaLayer": MAMBA2,
    "NemotronHMamba2Mixer": MAMBA2,
    "Zamba2MambaMixer": MAMBA2,
    "FalconH1Mixer": MAMBA2,
    "MambaMixer": MAMBA,
    "FalconMambaMixer": MAMBA,
    "JambaMambaMixer": MAMBA,
    "ZambaMambaMixer": ZAMBA,
    "Qwen3NextGatedDeltaNet": QWEN3_NEXT,
    "Qwen3_5GatedDeltaNet": QWEN3_5,
    "Qwen3_5MoeGatedDeltaNet": QWEN3_5,
    "OlmoHybridGatedDeltaNet": OLMO_HYBRID,
    "KimiLinearDeltaAttention": KIMI_LINEAR,
    "RecurrentGemmaRecurrentBlock": RG_LRU,
    "MiniMaxLightningAttention": LIGHTNING,
    "Lfm2ShortConv": SHORT_CONVOLUTION,
    "Lfm2MoeShortConv": SHORT_CONVOLUTION,
    "Lfm3ShortConv": SHORT_CONVOLUTION,
}
