"""Conversion target Qwen3.5 (language model): attention with query and key norms, or gated delta mixers.

Three features of its attention are undone, the first two exactly in binary arithmetic:

- Each head's output is multiplied by the sigmoid of a gate of its own, whose rows lie beside the query's: gate rows of
  zero make it 1/2, and the output projection is doubled.
- A norm multiplies by one plus its weight, so weights are written minus one.
- A teacher without query and key norms: with queries and keys scaled by `BELOW_EPSILON`, their mean square is far below
  the norm's ε, so that the norm is linear, x / √ε, and its weight √ε / `BELOW_EPSILON` undoes both. One
  optimizer step on such a norm or its projections destroys this, so these parameters must stay frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedConfig, Qwen3_5TextConfig

from xarch_kd.models.conversion.bamba import CONVOLUTION, copied_fields, projections
from xarch_kd.models.conversion.mixers import MixerShape
from xarch_kd.models.conversion.rotary import rotary_parameters
from xarch_kd.models.conversion.teacher_spec import AttentionSpec, TeacherSpec
from xarch_kd.models.conversion.weights import BlockWeights, LinearWeights, TeacherWeights, widened

BELOW_EPSILON = 1e-7

# Names, within an attention, of what makes a norm linear and must not change.
LINEAR_NORM = ("q_proj", "k_proj", "q_norm", "k_norm")


def qwen3_5_unsupported_reason(spec: TeacherSpec) -> str | None:
    """Return why Qwen3.5's class cannot hold a teacher, or None."""
    if spec.norm_after:
        return "its norms follow attention and MLP, where Qwen3.5's precede them"
    if spec.query_key_norm == "width":
        return "it norms queries and keys over all heads together, and Qwen3.5 norms each head"
    if spec.mlp_bias:
        return "its MLP has biases, and Qwen3.5's has no place for them"
    return None


def qwen3_5_config(spec: TeacherSpec, kept: Sequence[int], teacher: PreTrainedConfig) -> Qwen3_5TextConfig:
    """Return the config of a student that keeps attention in the blocks `kept`.

    Raises `ConversionError` if the kept blocks do not agree on whether they use rotary positions.
    """
    return Qwen3_5TextConfig(
        **copied_fields(spec, teacher),
        **delta_fields(spec),
        architectures=["Qwen3_5ForCausalLM"],
        tie_word_embeddings=spec.tied and not spec.is_scaled,
        rope_parameters=rotary_parameters(spec, kept),
        layer_types=["full_attention" if index in kept else "linear_attention" for index in range(spec.layers)],
    )


def delta_fields(spec: AttentionSpec) -> dict[str, Any]:
    """Return the sizes of gated delta mixers with one key and one value head for each query head of the teacher.

    In this class several value heads can share a key head but not the reverse, so shared key and value heads of a
    teacher are repeated.
    """
    return {
        "linear_num_key_heads": spec.heads,
        "linear_num_value_heads": spec.heads,
        "linear_key_head_dim": spec.head_dim,
        "linear_value_head_dim": spec.head_dim,
        "linear_conv_kernel_dim": CONVOLUTION,
    }


def delta_shape(sizes: Mapping[str, Any]) -> MixerShape:
    """Return the sizes of gated delta mixers from `delta_fields` and the hidden size."""
    return MixerShape(
        width=sizes["hidden_size"],
        heads=sizes["linear_num_value_heads"],
        channels=sizes["linear_value_head_dim"],
        state=sizes["linear_key_head_dim"],
        convolution=sizes["linear_conv_kernel_dim"],
    )


def qwen3_5_state(weights: TeacherWeights, kept: Sequence[int]) -> dict[str, Tensor]:
    """Return all weights of a student except those of its mixers."""
    spec = weights.spec
    state = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": _minus_one(weights.final_norm)}
    state["lm_head.weight"] = weights.head
    for index in range(spec.layers):
        block, place = weights.block(index), f"model.layers.{index}"
        state[f"{place}.input_layernorm.weight"] = _minus_one(block.mixer_norm)
        state[f"{place}.post_attention_layernorm.weight"] = _minus_one(block.mlp_norm)
        mlp = {"gate_proj": block.gate, "up_proj": block.up, "down_proj": block.down}
        state |= projections(f"{place}.mlp", mlp, with_bias=False)
        if index in kept:
            state |= _attention(f"{place}.self_attn", block, spec)
    return state


def qwen3_5_mixer(place: str, mixer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a gated delta mixer, given under the names of `delta_mixers.py`, under Qwen3.5's names."""
    named = {
        "in_proj_qkv.weight": torch.cat([mixer["query"], mixer["key"], mixer["value"]]),
        "in_proj_z.weight": mixer["gate"],
        "in_proj_b.weight": mixer["beta"],
        "in_proj_a.weight": mixer["step"],
        "conv1d.weight": mixer["convolution"],
        "dt_bias": mixer["dt_bias"],
        "A_log": mixer["A_log"],
        "norm.weight": mixer["norm"],
        "out_proj.weight": mixer["output"],
    }
    return {f"{place}.linear_attn.{name}": value for name, value in named.items()}


def _attention(place: str, block: BlockWeights, spec: TeacherSpec) -> dict[str, Tensor]:
    query, key = block.query, block.key
    query_norm, key_norm = block.query_norm, block.key_norm
    if query_norm is None or key_norm is None:
        query, key = query.scaled(BELOW_EPSILON), key.scaled(BELOW_EPSILON)
        undone = spec.epsilon**0.5 / BELOW_EPSILON
        query_norm = key_norm = widened(query.weight).new_full((spec.head_dim,), undone)
    # Doubling undoes the gate of 1/2, which multiplies what the projection reads and so not its bias.
    output = LinearWeights(weight=block.output.weight * 2, bias=block.output.bias)
    named = {"q_proj": _gated(query, spec.heads), "k_proj": key, "v_proj": block.value, "o_proj": output}
    state = projections(place, named, with_bias=spec.input_bias or spec.output_bias)
    state[f"{place}.q_norm.weight"] = _minus_one(query_norm)
    state[f"{place}.k_norm.weight"] = _minus_one(key_norm)
    return state


def _gated(query: LinearWeights, heads: int) -> LinearWeights:
    """Return the query's rows, each head's followed by as many rows of zeros for its gate."""

    def padded(rows: Tensor) -> Tensor:
        apart = rearrange(rows, "(h d) w -> h d w", h=heads)
        return rearrange(torch.cat([apart, torch.zeros_like(apart)], dim=1), "h d w -> (h d) w")

    bias = None if query.bias is None else padded(query.bias[:, None])[:, 0]
    return LinearWeights(weight=padded(query.weight), bias=bias)


def _minus_one(weight: Tensor) -> Tensor:
    return widened(weight) - 1.0
