"""Layouts of Transformers whose blocks are attention and gated MLP, each after a norm."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.models.gguf.layout import (
    HALVES,
    NEIGHBOURS,
    SIZES,
    GgufLayout,
    TensorSource,
    Value,
    pair_neighbours,
    rotary_divisors,
    transformer_metadata,
    whole_heads,
)

_SILU: Final = {"hidden_act": ("silu", "swish")}
_NO_WINDOW: Final = {"sliding_window": (None,), "use_sliding_window": (False,)}
_GRANITE: Final = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
# Step of the blocks without rotary positions that is built into llama.cpp's smollm3.
_SMOLLM3_STEP: Final = 4

_PROJECTIONS: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def transformer_tensors(
    model: PreTrainedModel,
    source: TensorSource,
    *,
    pairs: str,
    norm_offset: float = 0.0,
    norms: Mapping[str, str] = _NORMS,
    blocks: range | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of a Transformer, or of its `blocks` alone, under llama.cpp's names.

    `pairs` is the order of rotary dimensions in llama.cpp, `norm_offset` what its norms' weights have more.
    """
    config: Any = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = outer_tensors(source, norm_offset=norm_offset) | rotary_divisors(model)
    for index in blocks if blocks is not None else range(config.num_hidden_layers):
        place = f"model.layers.{index}"
        for name, short in norms.items():
            weight = source.take_if_there(f"{place}.{name}.weight")
            if weight is not None:
                found[f"blk.{index}.{short}.weight"] = offset(weight, norm_offset)
        for name, short in _PROJECTIONS.items():
            for kind in ("weight", "bias"):
                value = source.take_if_there(f"{place}.{name}.{kind}")
                if value is not None and pairs == NEIGHBOURS and short in heads:
                    value = pair_neighbours(value, heads[short])
                if value is not None:
                    found[f"blk.{index}.{short}.{kind}"] = value
    return found


def outer_tensors(
    source: TensorSource, *, embedding: str = "model.embed_tokens", norm: str = "model.norm", norm_offset: float = 0.0
) -> dict[str, Tensor]:
    """Return embedding, last norm and, if it is not tied, head."""
    found = {
        "token_embd.weight": source.take(f"{embedding}.weight"),
        "output_norm.weight": offset(source.take(f"{norm}.weight"), norm_offset),
    }
    head = source.take_if_there("lm_head.weight")
    return found if head is None else found | {"output.weight": head}


def offset(weight: Tensor, by: float) -> Tensor:
    """Return a norm's weight as llama.cpp multiplies by it, in float32 if it differs."""
    return weight if by == 0.0 else weight.float() + by


def _granite_metadata(model: PreTrainedModel) -> dict[str, Value]:
    scales = {key: float(getattr(model.config, name)) for name, key in _GRANITE.items()}
    return transformer_metadata(model) | scales


def _phi3_metadata(model: PreTrainedModel) -> dict[str, Value]:
    # Without the key, llama.cpp takes the window of Phi-3's first release.
    return transformer_metadata(model) | {"attention.sliding_window": 0}


def _full_rotary(config: Any) -> str | None:
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates a part of each head"
    return None


def _windowed(config: Any) -> str | None:
    if any(kind != "full_attention" for kind in config.layer_types or ()):
        return "some of its blocks attend through a sliding window"
    return None


def _smollm3_reason(config: Any) -> str | None:
    built_in = [int((index + 1) % _SMOLLM3_STEP != 0) for index in range(config.num_hidden_layers)]
    if [int(value) for value in config.no_rope_layers] != built_in:
        return (
            f"its blocks without rotary positions are not every {_SMOLLM3_STEP}th, which is built in "
            f"(no_rope_layers: {config.no_rope_layers})"
        )
    return None


def _gemma_reason(config: Any) -> str | None:
    return None if config.tie_word_embeddings else "its head is not its embedding, which llama.cpp reads as the head"


_neighbours = partial(transformer_tensors, pairs=NEIGHBOURS)
_halves = partial(transformer_tensors, pairs=HALVES)
_LAYER_TYPES: Final = frozenset({"layer_types"})

TRANSFORMERS: Final[Mapping[str, GgufLayout]] = {
    "llama": GgufLayout(
        architecture="llama",
        carried=SIZES | {"attention_bias", "mlp_bias"},
        fixed=_SILU,
        unsupported_reason=_full_rotary,
        metadata=transformer_metadata,
        tensors=_neighbours,
    ),
    "mistral": GgufLayout(
        architecture="llama",
        carried=SIZES,
        fixed=_SILU | _NO_WINDOW,
        unsupported_reason=_full_rotary,
        metadata=transformer_metadata,
        tensors=_neighbours,
    ),
    "qwen2": GgufLayout(
        architecture="qwen2",
        carried=SIZES | _LAYER_TYPES,
        fixed=_SILU | _NO_WINDOW,
        unsupported_reason=lambda config: _full_rotary(config) or _windowed(config),
        metadata=transformer_metadata,
        tensors=_halves,
    ),
    "qwen3": GgufLayout(
        architecture="qwen3",
        carried=SIZES | _LAYER_TYPES,
        fixed=_SILU | _NO_WINDOW | {"attention_bias": (False,)},
        unsupported_reason=lambda config: _full_rotary(config) or _windowed(config),
        metadata=transformer_metadata,
        tensors=_halves,
    ),
    "phi3": GgufLayout(
        architecture="phi3",
        # The original length matters to scaled positions only, and Phi-3's own scaling is refused.
        carried=SIZES | {"original_max_position_embeddings"},
        fixed=_SILU | _NO_WINDOW,
        unsupported_reason=_full_rotary,
        metadata=_phi3_metadata,
        tensors=_halves,
    ),
    "granite": GgufLayout(
        architecture="granite",
        carried=SIZES | set(_GRANITE) | {"attention_bias", "mlp_bias"},
        fixed=_SILU,
        unsupported_reason=lambda config: _full_rotary(config) or whole_heads(config),
        metadata=_granite_metadata,
        tensors=_neighbours,
    ),
    "smollm3": GgufLayout(
        architecture="smollm3",
        carried=SIZES | _LAYER_TYPES | {"no_rope_layers", "no_rope_layer_interval"},
        fixed=_SILU | _NO_WINDOW | {"attention_bias": (False,), "mlp_bias": (False,)},
        unsupported_reason=lambda config: _full_rotary(config) or _windowed(config) or _smollm3_reason(config),
        metadata=transformer_metadata,
        tensors=_neighbours,
    ),
    "gemma": GgufLayout(
        architecture="gemma",
        carried=SIZES,
        fixed={
            "hidden_act": ("gelu_pytorch_tanh",),
            "attention_bias": (False,),
            "use_bidirectional_attention": (None, False),
        },
        unsupported_reason=lambda config: _full_rotary(config) or _gemma_reason(config),
        metadata=transformer_metadata,
        tensors=partial(transformer_tensors, pairs=HALVES, norm_offset=1.0),
    ),
}
