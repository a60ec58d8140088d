"""Conversion target GraniteMoeHybrid without experts: has Granite's multipliers, and blocks without positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import GraniteMoeHybridConfig, PreTrainedConfig

from xarch_kd.models.conversion.bamba import attention_state, copied_fields, mamba2_fields
from xarch_kd.models.conversion.rotary import is_rotary
from xarch_kd.models.conversion.teacher_spec import TeacherSpec
from xarch_kd.models.conversion.weights import TeacherWeights


def granitemoehybrid_unsupported_reason(spec: TeacherSpec) -> str | None:
    """Return why GraniteMoeHybrid cannot hold a teacher, or None."""
    if spec.norm_after:
        return "its norms follow attention and MLP, where GraniteMoeHybrid's precede them"
    if spec.query_key_norm is not None:
        return "its query and key norms are not linear and no Mamba-2 class has them"
    if spec.mlp_bias:
        return "its MLP has biases, and GraniteMoeHybrid's has no place for them"
    if spec.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates a part of each head, and GraniteMoeHybrid rotates whole heads regardless of its config"
    return None


def unscaled(spec: TeacherSpec) -> TeacherSpec:
    """Return the spec for reading weights as they are: the class has the four multipliers itself."""
    return replace(spec, embedding_scale=1.0, residual_scale=1.0, logit_scale=1.0, attention_scale=spec.head_dim**-0.5)


def granitemoehybrid_config(
    spec: TeacherSpec, kept: Sequence[int], teacher: PreTrainedConfig
) -> GraniteMoeHybridConfig:
    """Return the config of a student that keeps attention in the blocks `kept`.

    Raises `ConversionError` if the kept blocks do not agree on whether they use rotary positions.
    """
    return GraniteMoeHybridConfig(
        **copied_fields(spec, teacher),
        **mamba2_fields(spec),
        architectures=["GraniteMoeHybridForCausalLM"],
        tie_word_embeddings=spec.tied,
        shared_intermediate_size=spec.intermediate,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=["full_attention" if index in kept else "linear_attention" for index in range(spec.layers)],
        position_embedding_type="rope" if is_rotary(spec, kept) else None,
        rope_parameters=dict(spec.rope_parameters),
        # The class's own default multiplies q·k by 1, not by the root of the head's size.
        attention_multiplier=spec.attention_scale,
        embedding_multiplier=spec.embedding_scale,
        residual_multiplier=spec.residual_scale,
        logits_scaling=1.0 / spec.logit_scale,
    )


def granitemoehybrid_state(weights: TeacherWeights, kept: Sequence[int]) -> dict[str, Tensor]:
    """Return all weights of a student except those of its mixers; `weights` are read with the `unscaled` spec."""
    state = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.final_norm}
    state["lm_head.weight"] = weights.head
    for index in range(weights.spec.layers):
        block, place = weights.block(index), f"model.layers.{index}"
        state[f"{place}.input_layernorm.weight"] = block.mixer_norm
        state[f"{place}.post_attention_layernorm.weight"] = block.mlp_norm
        state[f"{place}.shared_mlp.input_linear.weight"] = torch.cat([block.gate.weight, block.up.weight])
        state[f"{place}.shared_mlp.output_linear.weight"] = block.down.weight
        if index in kept:
            state |= attention_state(f"{place}.self_attn", block, weights.spec)
    return state
