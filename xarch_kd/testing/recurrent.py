"""Tiny random models of every family with a recurrent mixer; imported by tests and benchmarks only.

Sizes are distinct if a family allows it (groups and heads, key and value dims), so that swapped axes do not fit, and
every weight, bias, decay and step is non-trivial, so that a missing one changes the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, PreTrainedModel

from xarch_kd.testing.tiny import VOCABULARY, seeded_model

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
# Bounds that some steps of a random model exceed on each side.
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 5,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "mamba_proj_bias": True,
    "time_step_limit": (0.2, 1.5),
}
_MAMBA: dict[str, Any] = {"state_size": 6, "expand": 2, "time_step_rank": 3, "use_bias": True}
_JAMBA: dict[str, Any] = {"mamba_d_state": 6, "mamba_expand": 2, "mamba_dt_rank": 3, "mamba_proj_bias": True}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DELTA: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "layer_types": ["linear_attention", "full_attention"],
}
_CONVOLUTION: dict[str, Any] = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 4}

# Sizes beyond the shared ones, by `model_type`.
SIZES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "mamba2": {
        "state_size": 5,
        "expand": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "use_bias": True,
        "time_step_limit": (0.2, 1.5),
    },
    "granitemoehybrid": {
        **_MAMBA2,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention"],
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "head_dim": 8,
        "ssm_state_size": 5,
        "mamba_num_heads": 6,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "time_step_min": 0.2,
        "use_bias": True,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 5,
        "mamba_expand": 2,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "chunk_size": 8,
        "time_step_min": 0.2,
        "add_bias_linear": True,
    },
    "falcon_h1": {
        **_MAMBA2,
        "mamba_d_ssm": 48,
        "mamba_n_heads": 6,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "ssm_multipliers": [0.7, 1.6, 0.4, 2.1, 1.3],
        "ssm_in_multiplier": 1.4,
    },
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "jamba": {**_JAMBA, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {
        **_JAMBA,
        "n_mamba_heads": 4,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
    },
    "qwen3_next": {**_DELTA, **_EXPERTS, "mlp_only_layers": [0, 1]},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4},
    "kimi_linear": {
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "dense"],
        "linear_head_dim": 6,
        "linear_num_heads": 4,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "recurrent_gemma": {"lru_width": 40, "block_types": ["recurrent", "attention"]},
    "minimax": {
        "head_dim": 6,
        "block_size": 8,
        "num_local_experts": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    # In eval mode the class halves its hidden state every N blocks.
    "rwkv": {"rescale_every": 0},
    "lfm2": _CONVOLUTION,
    "lfm2_moe": {**_CONVOLUTION, **_EXPERTS},
    "lfm3": {**_CONVOLUTION, "head_dim": 8},
}


def recurrent_model(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a float32 model of two blocks with a recurrent mixer, in eval mode, the same for the same seed.

    `overrides` replace sizes.
    """
    sizes = {**_SHARED, **SIZES[model_type], **overrides}
    return seeded_model(lambda: AutoConfig.for_model(model_type, **sizes), _perturb, seed, (model_type, overrides))


def _perturb(name: str, parameter: nn.Parameter) -> None:
    """Set a parameter to values for which the mixer's decays differ between tokens."""
    noise = torch.randn_like(parameter)
    if name.endswith("A_log"):
        parameter.copy_(0.6 * noise - 1.0)
    elif parameter.ndim == 1 or name.endswith(("dt_proj_bias", ".D")):
        parameter.copy_(parameter.clamp(-1.0, 1.0) + 0.3 * noise)
    elif "conv" in name:
        parameter.copy_(0.6 * noise)
    else:
        fan_in = 1 if "embed" in name else parameter.shape[-1]
        parameter.copy_(1.2 * fan_in**-0.5 * noise)


class Recorded(NamedTuple):
    """Records of one forward pass at a mixer: the outputs of its projections by path, and its inner output."""

    projected: dict[str, Tensor]
    inner: Tensor


def read_mixer(
    model: PreTrainedModel,
    mixer: nn.Module,
    projections: Sequence[str],
    inner: str,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> Recorded:
    """Run the model once; return the outputs of the mixer's `projections` and the input of its module `inner`.

    If `inner` ends with `()`, the output of that module is returned instead.
    """
    seen: dict[str, Tensor] = {}

    def keep_output(name: str) -> RemovableHandle:
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            seen[name] = output

        return mixer.get_submodule(name.removesuffix("()")).register_forward_hook(keep)

    def keep_input(name: str) -> RemovableHandle:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return mixer.get_submodule(name).register_forward_pre_hook(keep)

    handles = [keep_output(name) for name in projections]
    handles.append(keep_output(inner) if inner.endswith("()") else keep_input(inner))
    try:
        model(input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Recorded({name: seen[name] for name in projections}, seen[inner])
