"""Canonical weights of the attention of families that are converted in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from einops import rearrange, reduce
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.models.conversion.teacher_spec import AttentionSpec
from xarch_kd.models.conversion.weights import AttentionWeights, LinearWeights
from xarch_kd.models.in_place.teachers import IN_PLACE_TEACHERS


def attention_of(teacher: PreTrainedModel, layer: int) -> AttentionWeights:
    """Return the weights of the attention of one block of a teacher, in float32.

    Norms of queries and keys are folded into their projections, at the size that they have for white input.
    """
    family = IN_PLACE_TEACHERS[teacher.config.model_type]
    blocks: Any = getattr(teacher.base_model, family.blocks)
    return WEIGHT_READERS[family.attention](blocks[layer], teacher.config, family.norm_offset)


def attention_sizes(config: PreTrainedConfig) -> AttentionSpec:
    """Return the sizes of the attention of a config of one of the families."""
    values: Any = config
    heads = values.num_attention_heads
    epsilons = (getattr(config, name, None) for name in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"))
    return AttentionSpec(
        width=values.hidden_size,
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or values.hidden_size // heads,
        epsilon=next(epsilon for epsilon in epsilons if epsilon is not None),
    )


def _separate(block: nn.Module, config: PreTrainedConfig, norm_offset: float) -> AttentionWeights:
    """Return the weights of an attention with four projections, with or without norms of queries and keys."""
    sizes, inner = attention_sizes(config), block.get_submodule("self_attn")
    norm = _weight(block, "input_layernorm") + norm_offset
    query, key = _linear(inner, "q_proj"), _linear(inner, "k_proj")
    if hasattr(inner, "q_norm"):
        query = _normed(query, norm, _weight(inner, "q_norm") + norm_offset, sizes.heads)
        key = _normed(key, norm, _weight(inner, "k_norm") + norm_offset, sizes.key_value_heads)
    scale = getattr(config, "query_pre_attn_scalar", sizes.head_dim) ** -0.5
    return AttentionWeights(
        query=query.scaled(scale * sizes.head_dim**0.5),
        key=key,
        value=_linear(inner, "v_proj"),
        output=_linear(inner, "o_proj"),
        mixer_norm=norm,
    )


def _transposed(block: nn.Module, config: PreTrainedConfig, norm_offset: float) -> AttentionWeights:
    """Return the weights of GPT-2's attention: transposed, with joint queries, keys and values and its own scaling."""
    sizes = attention_sizes(config)
    weights, biases = _weight(block, "attn.c_attn").T.chunk(3), _bias(block, "attn.c_attn").chunk(3)
    query, key, value = (LinearWeights(weight=one, bias=other) for one, other in zip(weights, biases, strict=True))
    scaling: Any = block.get_submodule("attn").scaling
    output = LinearWeights(weight=_weight(block, "attn.c_proj").T, bias=_bias(block, "attn.c_proj"))
    query = query.scaled(scaling * sizes.head_dim**0.5)
    return AttentionWeights(
        query=query, key=key, value=value, output=output, mixer_norm=_weight(block, "ln_1") + norm_offset
    )


def _fused_heads(block: nn.Module, config: PreTrainedConfig, norm_offset: float) -> AttentionWeights:
    """Return the weights of GPT-NeoX's attention, whose joint projection interleaves q, k and v head by head."""
    fused, heads = _linear(block.get_submodule("attention"), "query_key_value"), attention_sizes(config).heads
    weights = rearrange(fused.weight, "(h part d) w -> part (h d) w", h=heads, part=3)
    biases: Any = [None] * 3
    if fused.bias is not None:
        biases = rearrange(fused.bias, "(h part d) -> part (h d)", h=heads, part=3)
    query, key, value = (LinearWeights(weight=one, bias=other) for one, other in zip(weights, biases, strict=True))
    output = _linear(block.get_submodule("attention"), "dense")
    norm = _weight(block, "input_layernorm") + norm_offset
    return AttentionWeights(query=query, key=key, value=value, output=output, mixer_norm=norm)


def _normed(projection: LinearWeights, norm: Tensor, weight: Tensor, heads: int) -> LinearWeights:
    """Return the projection scaled to the size, for white input after `norm`, of heads normalized with `weight`."""
    squares = reduce((projection.weight * norm).square().sum(1), "(h d) -> h 1", "mean", h=heads)
    scale = rearrange(weight * squares.clamp_min(1e-12).rsqrt(), "h d -> (h d)")
    bias = None if projection.bias is None else projection.bias * scale
    return LinearWeights(weight=projection.weight * scale[:, None], bias=bias)


def _linear(module: nn.Module, name: str) -> LinearWeights:
    layer: Any = module.get_submodule(name)
    return LinearWeights(weight=_weight(module, name), bias=None if layer.bias is None else layer.bias.detach().float())


def _weight(module: nn.Module, path: str) -> Tensor:
    layer: Any = module.get_submodule(path)
    return layer.weight.detach().float()


def _bias(module: nn.Module, path: str) -> Tensor:
    layer: Any = module.get_submodule(path)
    return layer.bias.detach().float()


WEIGHT_READERS: dict[str, Callable[[nn.Module, PreTrainedConfig, float], AttentionWeights]] = {
    "separate": _separate,
    "fused_heads": _fused_heads,
    "transposed": _transposed,
}
