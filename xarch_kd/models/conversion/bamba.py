"""Conversion target Bamba: the stock class of Llama-shaped blocks with attention or Mamba-2 mixers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import BambaConfig, PreTrainedConfig

from xarch_kd.errors import ConversionError
from xarch_kd.models.conversion.activation_stats import ActivationStats
from xarch_kd.models.conversion.mixers import MixerShape
from xarch_kd.models.conversion.rotary import rotary_parameters
from xarch_kd.models.conversion.teacher_spec import AttentionSpec, TeacherSpec
from xarch_kd.models.conversion.weights import BlockWeights, LinearWeights, TeacherWeights

CONVOLUTION = 4
# Of 64, 128 and 256 the fastest in the PyTorch path of transformers on a CPU; the kernels take any power of two.
CHUNK = 64


def bamba_unsupported_reason(spec: TeacherSpec) -> str | None:
    """Return why Bamba cannot hold a teacher, or None."""
    if spec.norm_after:
        return "its norms follow attention and MLP, where Bamba's precede them"
    if spec.query_key_norm is not None:
        return "its query and key norms are not linear and no Mamba-2 class has them"
    return None


def mixer_head_dim(spec: AttentionSpec) -> tuple[int, int]:
    """Return (expansion, channels per mixer head), the smallest that hold the teacher's heads.

    A mixer has `expansion × hidden size` channels, split evenly over the heads; `expansion` is an integer. A narrower
    head of the teacher fills the first channels of its mixer head; the others are zero.
    """
    for expansion in range(1, 65):
        channels, rest = divmod(expansion * spec.width, spec.heads)
        if rest == 0 and channels >= spec.head_dim:
            return expansion, channels
    raise ConversionError(
        "No whole multiple of the teacher's width splits evenly over its heads, as a Mamba-2 mixer needs.",
        found=f"width {spec.width}, {spec.heads} heads of {spec.head_dim}",
    )


def bamba_config(spec: TeacherSpec, kept: Sequence[int], teacher: PreTrainedConfig) -> BambaConfig:
    """Return the config of a Bamba student that keeps attention in the blocks `kept`.

    It is built field by field: a teacher's config may have keys (quantization, code) that a student must not have.
    Raises `ConversionError` if the kept blocks do not agree on whether they use rotary positions.
    """
    return BambaConfig(
        **copied_fields(spec, teacher),
        **mamba2_fields(spec),
        architectures=["BambaForCausalLM"],
        tie_word_embeddings=spec.tied and not spec.is_scaled,
        mlp_bias=spec.mlp_bias,
        rope_parameters=rotary_parameters(spec, kept),
        attn_layer_indices=list(kept),
    )


def copied_fields(spec: TeacherSpec, teacher: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that every student class has under the same names."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings")
    return {name: getattr(teacher, name) for name in names} | {
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.key_value_heads,
        # Not a field of every config class, but every attention reads it and it survives saving.
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate,
        "hidden_act": spec.activation,
        "rms_norm_eps": spec.epsilon,
        "attention_dropout": getattr(teacher, "attention_dropout", 0.0),
        "attention_bias": spec.input_bias or spec.output_bias,
    }


def mamba2_fields(spec: AttentionSpec) -> dict[str, Any]:
    """Return the sizes of Mamba-2 mixers with one head and one group for each head of the teacher."""
    expansion, channels = mixer_head_dim(spec)
    return {
        "mamba_expand": expansion,
        "mamba_n_heads": spec.heads,
        "mamba_n_groups": spec.heads,
        "mamba_d_head": channels,
        "mamba_d_state": spec.head_dim,
        "mamba_d_conv": CONVOLUTION,
        "mamba_chunk_size": CHUNK,
        "mamba_conv_bias": True,
        "mamba_proj_bias": True,
    }


def mamba2_shape(sizes: Mapping[str, Any]) -> MixerShape:
    """Return the sizes of Mamba-2 mixers from `mamba2_fields` and the hidden size."""
    return MixerShape(
        width=sizes["hidden_size"],
        heads=sizes["mamba_n_heads"],
        channels=sizes["mamba_d_head"],
        state=sizes["mamba_d_state"],
        convolution=sizes["mamba_d_conv"],
        groups=sizes["mamba_n_groups"],
        proj_bias=sizes["mamba_proj_bias"],
    )


def mamba2_state(
    place: str, mixer: dict[str, Tensor], block: BlockWeights, stats: ActivationStats | None
) -> dict[str, Tensor]:
    """Return the weights of a Mamba-2 mixer, given under the names of `mixers.py`, under Bamba's names."""
    return {f"{place}.mamba.{name}": value for name, value in mixer.items()}


def bamba_state(weights: TeacherWeights, kept: Sequence[int]) -> dict[str, Tensor]:
    """Return all weights of a Bamba student except those of its mixers, under Bamba's names.

    Tensors into which nothing is folded are the teacher's own, not copies.
    """
    state = {"model.embed_tokens.weight": weights.embedding, "model.final_layernorm.weight": weights.final_norm}
    state["lm_head.weight"] = weights.head
    for index in range(weights.spec.layers):
        block, place = weights.block(index), f"model.layers.{index}"
        state[f"{place}.input_layernorm.weight"] = block.mixer_norm
        state[f"{place}.pre_ff_layernorm.weight"] = block.mlp_norm
        mlp = {"gate_proj": block.gate, "up_proj": block.up, "down_proj": block.down}
        state |= projections(f"{place}.feed_forward", mlp, with_bias=weights.spec.mlp_bias)
        if index in kept:
            state |= attention_state(f"{place}.self_attn", block, weights.spec)
    return state


def attention_state(place: str, block: BlockWeights, spec: TeacherSpec) -> dict[str, Tensor]:
    """Return the weights of an attention with four projections, under the prefix `place`."""
    named = {"q_proj": block.query, "k_proj": block.key, "v_proj": block.value, "o_proj": block.output}
    # The classes have one switch for the four biases; one that the teacher lacks is zero.
    return projections(place, named, with_bias=spec.input_bias or spec.output_bias)


def projections(place: str, named: Mapping[str, LinearWeights], *, with_bias: bool) -> dict[str, Tensor]:
    """Return weights, and biases if the class has them, under the prefix `place`; missing biases are zero."""
    state = {f"{place}.{name}.weight": projection.weight for name, projection in named.items()}
    if with_bias:
        for name, projection in named.items():
            missing = projection.weight.new_zeros(projection.weight.shape[0])
            state[f"{place}.{name}.bias"] = missing if projection.bias is None else projection.bias
    return state
