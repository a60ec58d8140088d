"""Names of the mixers and student classes to convert to. No torch is imported: the mapping file's schema uses them."""

from __future__ import annotations

from typing import Literal

MixerName = Literal["mamba2", "gated_delta"]
TargetName = Literal["auto", "bamba", "granitemoehybrid", "qwen3_5", "olmo_hybrid", "in_place"]
