"""Layouts of models with recurrent mixers: Mamba-2, Qwen3.5's gated delta rule, GraniteMoeHybrid without experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.models.gguf.layout import (
    HALVES,
    NEIGHBOURS,
    SIZES,
    GgufLayout,
    TensorSource,
    Value,
    inverse_frequencies,
    transformer_metadata,
    whole_heads,
)
from xarch_kd.models.gguf.transformer import outer_tensors, transformer_tensors

# Context that llama.cpp's converter writes for models without positions.
UNBOUNDED_CONTEXT: Final = 2**20
# The clamp of a Mamba-2 mixer's step that changes nothing; llama.cpp has none.
_NO_CLAMP: Final = ([0.0, math.inf], (0.0, math.inf))
# Names of a recurrent block in a config's `layer_types`.
_RECURRENT: Final = ("linear_attention", "mamba")


def mamba2_mixer(
    place: str, block: int, source: TensorSource, *, groups: int, inner: int, channels: int
) -> dict[str, Tensor]:
    """Return the tensors of the Mamba-2 mixer at `place`: `groups` of the norm over `inner` channels.

    A is stored as −exp(A_log). Each architecture requires the bias of the convolution over `channels`.
    """
    bias = source.take_if_there(f"{place}.conv1d.bias")
    named = {
        "ssm_in.weight": source.take(f"{place}.in_proj.weight"),
        "ssm_conv1d.weight": source.take(f"{place}.conv1d.weight").squeeze(1),
        "ssm_conv1d.bias": torch.zeros(channels) if bias is None else bias,
        "ssm_dt.bias": source.take(f"{place}.dt_bias"),
        "ssm_a": -torch.exp(source.take(f"{place}.A_log").float())[:, None],
        "ssm_d": source.take(f"{place}.D")[:, None],
        "ssm_norm.weight": source.take(f"{place}.norm.weight").reshape(groups, inner // groups),
        "ssm_out.weight": source.take(f"{place}.out_proj.weight"),
    }
    return {f"blk.{block}.{name}": value for name, value in named.items()}


def _mamba2_metadata(model: PreTrainedModel) -> dict[str, Value]:
    config: Any = model.config
    return {
        "vocab_size": config.vocab_size,
        "context_length": UNBOUNDED_CONTEXT,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        # Read but not used.
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": float(config.layer_norm_epsilon),
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.inner_size": config.expand * config.hidden_size,
        "ssm.state_size": config.state_size,
        "ssm.time_step_rank": config.num_heads,
        "ssm.group_count": config.n_groups,
    }


def _mamba2_tensors(model: PreTrainedModel, source: TensorSource) -> dict[str, Tensor]:
    config: Any = model.config
    inner = config.expand * config.hidden_size
    channels = inner + 2 * config.n_groups * config.state_size
    found = outer_tensors(source, embedding="backbone.embeddings", norm="backbone.norm_f")
    for index in range(config.num_hidden_layers):
        place = f"backbone.layers.{index}"
        found[f"blk.{index}.attn_norm.weight"] = source.take(f"{place}.norm.weight")
        found |= mamba2_mixer(f"{place}.mixer", index, source, groups=config.n_groups, inner=inner, channels=channels)
    return found


def _delta_metadata(model: PreTrainedModel) -> dict[str, Value]:
    config: Any = model.config
    frequencies = inverse_frequencies(model)
    pairs = 0 if frequencies is None else len(frequencies)
    # Text has one position per token, the same in each section; the last section's is always 0, so that it is empty.
    sections = [-(-(pairs - start) // 3) for start in range(3)]
    return transformer_metadata(model) | {
        "rope.dimension_sections": [*sections, 0],
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.group_count": config.linear_num_key_heads,
        **_recurrent_layers(config.layer_types),
    }


def _recurrent_layers(kinds: Sequence[str]) -> dict[str, Value]:
    """Return which blocks are recurrent: by the interval of the others, or as a list for a newer llama.cpp."""
    recurrent = [kind in _RECURRENT for kind in kinds]
    for interval in range(1, len(kinds) + 2):
        if recurrent == [(index + 1) % interval != 0 for index in range(len(kinds))]:
            return {"full_attention_interval": interval}
    return {"attention.recurrent_layers": recurrent}


def _delta_tensors(model: PreTrainedModel, source: TensorSource) -> dict[str, Tensor]:
    config: Any = model.config
    norms = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }
    # Each head's query rows are followed by its gate's, as in llama.cpp.
    found = transformer_tensors(model, source, pairs=HALVES, norm_offset=1.0, norms=norms)
    for index, kind in enumerate(config.layer_types):
        if kind in _RECURRENT:
            found |= _delta_mixer(f"model.layers.{index}.linear_attn", index, source, config)
    return found


def _delta_mixer(place: str, block: int, source: TensorSource, config: Any) -> dict[str, Tensor]:
    keys, values, size = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    before = 2 * keys * config.linear_key_head_dim

    def tiled(rows: Tensor, per_head: int = size) -> Tensor:
        """Return rows of value heads in llama.cpp's order: head i reads key head i modulo their number."""
        apart = rows.reshape(keys, values // keys, per_head, *rows.shape[1:])
        return apart.swapaxes(0, 1).reshape(rows.shape)

    def after_keys(rows: Tensor) -> Tensor:
        return torch.cat([rows[:before], tiled(rows[before:])])

    named = {
        "attn_qkv.weight": after_keys(source.take(f"{place}.in_proj_qkv.weight")),
        "attn_gate.weight": tiled(source.take(f"{place}.in_proj_z.weight")),
        "ssm_beta.weight": tiled(source.take(f"{place}.in_proj_b.weight"), 1),
        "ssm_alpha.weight": tiled(source.take(f"{place}.in_proj_a.weight"), 1),
        "ssm_conv1d.weight": after_keys(source.take(f"{place}.conv1d.weight").squeeze(1)),
        "ssm_dt.bias": tiled(source.take(f"{place}.dt_bias"), 1),
        "ssm_a": tiled(-torch.exp(source.take(f"{place}.A_log").float()), 1),
        "ssm_norm.weight": source.take(f"{place}.norm.weight"),
        "ssm_out.weight": tiled(source.take(f"{place}.out_proj.weight").T).T,
    }
    return {f"blk.{block}.{name}": value for name, value in named.items()}


def _delta_reason(config: Any) -> str | None:
    if config.linear_key_head_dim != config.linear_value_head_dim:
        return (
            f"its mixers' keys have {config.linear_key_head_dim} dimensions and their values "
            f"{config.linear_value_head_dim}, and llama.cpp has one number for both"
        )
    return None


def _hybrid_metadata(model: PreTrainedModel) -> dict[str, Value]:
    config: Any = model.config
    heads = [0 if kind in _RECURRENT else config.num_key_value_heads for kind in config.layer_types]
    return transformer_metadata(model) | {
        "feed_forward_length": config.shared_intermediate_size,
        # A block is recurrent where this is 0.
        "attention.head_count_kv": heads,
        "rope.scaling.finetuned": config.position_embedding_type == "rope",
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "attention.scale": float(config.attention_multiplier),
        "logit_scale": float(config.logits_scaling),
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.inner_size": config.mamba_expand * config.hidden_size,
        "ssm.state_size": config.mamba_d_state,
        "ssm.time_step_rank": config.mamba_n_heads,
        "ssm.group_count": config.mamba_n_groups,
    }


def _hybrid_tensors(model: PreTrainedModel, source: TensorSource) -> dict[str, Tensor]:
    config: Any = model.config
    found = transformer_tensors(model, source, pairs=NEIGHBOURS)
    inner = config.mamba_expand * config.hidden_size
    channels = inner + 2 * config.mamba_n_groups * config.mamba_d_state
    for index, kind in enumerate(config.layer_types):
        place = f"model.layers.{index}"
        gate, up = source.take(f"{place}.shared_mlp.input_linear.weight").chunk(2)
        found |= {f"blk.{index}.ffn_gate.weight": gate, f"blk.{index}.ffn_up.weight": up}
        found[f"blk.{index}.ffn_down.weight"] = source.take(f"{place}.shared_mlp.output_linear.weight")
        if kind in _RECURRENT:
            found |= mamba2_mixer(
                f"{place}.mamba", index, source, groups=config.mamba_n_groups, inner=inner, channels=channels
            )
    return found


def _hybrid_reason(config: Any) -> str | None:
    if not any(kind in _RECURRENT for kind in config.layer_types):
        return "it has no recurrent block, and llama.cpp's granitehybrid expects one"
    return whole_heads(config)


_SILU: Final = {"hidden_act": ("silu", "swish")}

RECURRENT: Final[Mapping[str, GgufLayout]] = {
    "mamba2": GgufLayout(
        architecture="mamba2",
        carried=frozenset(
            {
                *("vocab_size", "hidden_size", "num_hidden_layers", "layer_norm_epsilon", "conv_kernel", "state_size"),
                *("num_heads", "head_dim", "n_groups", "use_conv_bias", "tie_word_embeddings"),
            }
        ),
        fixed=_SILU | {"expand": (2,), "use_bias": (False,), "time_step_limit": _NO_CLAMP},
        metadata=_mamba2_metadata,
        tensors=_mamba2_tensors,
    ),
    "qwen3_5_text": GgufLayout(
        architecture="qwen35",
        carried=SIZES
        | {
            *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads"),
            *("linear_num_value_heads", "layer_types"),
        },
        fixed=_SILU | {"attention_bias": (False,)},
        unsupported_reason=_delta_reason,
        metadata=_delta_metadata,
        tensors=_delta_tensors,
    ),
    "granitemoehybrid": GgufLayout(
        architecture="granitehybrid",
        carried=SIZES
        | {
            *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "layer_types"),
            *("shared_intermediate_size", "position_embedding_type", "mamba_n_heads", "mamba_n_groups"),
            *("mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_conv_bias", "num_experts_per_tok"),
            "attention_bias",
        },
        fixed=_SILU
        | {
            "mamba_expand": (2,),
            "mamba_proj_bias": (False,),
            "num_local_experts": (0,),
            "time_step_limit": _NO_CLAMP,
        },
        unsupported_reason=_hybrid_reason,
        metadata=_hybrid_metadata,
        tensors=_hybrid_tensors,
    ),
}
