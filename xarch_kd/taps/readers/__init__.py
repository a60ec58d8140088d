"""Readers of the mixing matrices of recurrent mixers, by the name of the mixer's class."""

from __future__ import annotations

from typing import Final

from xarch_kd.taps.readers.base import MixingReader
from xarch_kd.taps.readers.convolution import SHORT_CONVOLUTION
from xarch_kd.taps.readers.delta import KIMI_LINEAR, OLMO_HYBRID, QWEN3_5, QWEN3_NEXT
from xarch_kd.taps.readers.lightning import LIGHTNING
from xarch_kd.taps.readers.lru import RG_LRU
from xarch_kd.taps.readers.mamba import MAMBA, ZAMBA
from xarch_kd.taps.readers.mamba2 import MAMBA2
from xarch_kd.taps.readers.mamba_ssm import MAMBA_SSM_READERS

__all__ = ["MAMBA_SSM_READERS", "READERS", "MixingReader"]

READERS: Final[dict[str, MixingReader]] = {
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
