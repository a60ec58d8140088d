"""Bamba model that equals a GraniteMoeHybrid without experts, with its multipliers folded into the weights.

Bamba has the modules of `mamba_ssm.MambaLMHeadModel`, GraniteMoeHybrid has four multipliers and one matrix for both
input projections of the MLP. Where the multipliers are those of Bamba, the weights are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BambaConfig, PreTrainedConfig

from xarch_kd.errors import ConversionError

# Endings of names in GraniteMoeHybrid whose modules have another name in Bamba.
RENAMED = {
    "model.norm.weight": "model.final_layernorm.weight",
    ".post_attention_layernorm.weight": ".pre_ff_layernorm.weight",
    ".shared_mlp.output_linear.weight": ".feed_forward.down_proj.weight",
}
MLP_INPUT = ".shared_mlp.input_linear.weight"
# What a block adds to the residual stream, which `residual_multiplier` scales.
OUTPUTS = (
    *(f".{module}.{kind}" for module in ("self_attn.o_proj", "mamba.out_proj") for kind in ("weight", "bias")),
    ".shared_mlp.output_linear.weight",
)
SAME = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings"),
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "rms_norm_eps", "attention_dropout", "attention_bias", "time_step_limit"),
    *("mamba_expand", "mamba_n_heads", "mamba_n_groups", "mamba_d_head", "mamba_d_state", "mamba_d_conv"),
    *("mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias"),
)


def equal_bamba_config(config: PreTrainedConfig) -> BambaConfig:
    """Return the config of the Bamba model that equals a GraniteMoeHybrid. Raises `ConversionError` for experts."""
    values: Any = config
    if values.num_local_experts:
        raise ConversionError(
            "A GraniteMoeHybrid with experts equals no Bamba and no model of mamba_ssm.",
            found=f"num_local_experts: {values.num_local_experts}",
            allowed="num_local_experts: 0",
            fix="keep the format of transformers",
        )
    rope = dict(values.rope_parameters)
    is_rotary = values.position_embedding_type == "rope"
    if not is_rotary:
        rope = {"rope_type": "proportional", "rope_theta": rope["rope_theta"]}
    own: dict[str, Any] = {name: getattr(values, name) for name in SAME} | {"head_dim": _head_dim(config)}
    return BambaConfig(
        **own,
        architectures=["BambaForCausalLM"],
        tie_word_embeddings=values.tie_word_embeddings and _is_unscaled(config),
        intermediate_size=values.shared_intermediate_size,
        mlp_bias=False,
        rope_parameters={**rope, "partial_rotary_factor": 1.0 if is_rotary else 0.0},
        attn_layer_indices=[index for index, kind in enumerate(values.layer_types) if kind == "full_attention"],
    )


def equal_bamba_state(state: Mapping[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return the state dict of that Bamba model; tensors that are only renamed are not copied."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        weight = _scaled(value, _factor(name, config))
        if name.endswith(MLP_INPUT):
            place = name.removesuffix(MLP_INPUT)
            gate, up = weight.chunk(2)
            found |= {f"{place}.feed_forward.gate_proj.weight": gate, f"{place}.feed_forward.up_proj.weight": up}
            continue
        for own, other in RENAMED.items():
            if name.endswith(own):
                name = name.removesuffix(own) + other
                break
        found[name] = weight
    return found


def _factor(name: str, config: PreTrainedConfig) -> float:
    """Return what the weight is multiplied by, since Bamba has no multipliers."""
    values: Any = config
    if name == "model.embed_tokens.weight":
        return values.embedding_multiplier
    if name == "lm_head.weight":
        return 1.0 / values.logits_scaling
    if ".self_attn.q_proj." in name:
        return values.attention_multiplier / _head_dim(config) ** -0.5
    return values.residual_multiplier if name.endswith(OUTPUTS) else 1.0


def _scaled(weight: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return weight
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) * factor).to(weight.dtype)


def _is_unscaled(config: PreTrainedConfig) -> bool:
    values: Any = config
    return values.embedding_multiplier == 1.0 and values.logits_scaling == 1.0


def _head_dim(config: PreTrainedConfig) -> int:
    values: Any = config
    return getattr(values, "head_dim", None) or values.hidden_size // values.num_attention_heads
