"""Table of the model types that have an architecture in llama.cpp, and of those that have none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from transformers import PreTrainedConfig

from xarch_kd.errors import ConversionError
from xarch_kd.models.gguf.layout import GgufLayout
from xarch_kd.models.gguf.recurrent import RECURRENT
from xarch_kd.models.gguf.transformer import TRANSFORMERS

LAYOUTS: Final[Mapping[str, GgufLayout]] = {**TRANSFORMERS, **RECURRENT}

# Reasons for the student classes of this package that have none.
_ABSENT: Final[Mapping[str, str]] = {
    "bamba": "it is read as granitehybrid, whose mixers are twice as wide as the model and have no biases",
    "olmo_hybrid": "no architecture of it has gated delta mixers with norms after each sub-block",
    "mamba": "its Mamba-1 mixers are not exported",
}


def gguf_layout(config: PreTrainedConfig) -> GgufLayout:
    """Return the layout of a model in GGUF, its config checked. Raises `ConversionError` with the reason otherwise."""
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        in_place = config.model_type.startswith("xarch_kd")
        reason = "its class is this package's own" if in_place else _ABSENT.get(config.model_type, "it is not known")
        raise ConversionError(
            f"llama.cpp has no architecture for a model of type {config.model_type}: {reason}.",
            asked=f"model_type: {config.model_type}",
            allowed=", ".join(LAYOUTS),
            fix="convert with target: granitemoehybrid and mamba2: {expand: 2, proj_bias: false}, with mixer: "
            "gated_delta and target: qwen3_5, or build a fresh Mamba-2 student; or keep "
            "the format of transformers",
        )
    layout.check_config(config)
    return layout
