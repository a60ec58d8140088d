"""Initial weights of mixers in a teacher's own blocks, by the recipes for stock students."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.models.conversion.activation_stats import activation_stats
from xarch_kd.models.conversion.delta_mixers import delta_from_attention, random_delta
from xarch_kd.models.conversion.mixers import MixerShape, mixer_from_attention, random_mixer
from xarch_kd.models.conversion.qwen3_5 import qwen3_5_mixer
from xarch_kd.models.in_place.attention import attention_of, attention_sizes


def new_mixers(teacher: PreTrainedModel, config: PreTrainedConfig, *, seed: int | None) -> dict[int, dict[str, Tensor]]:
    """Return the state of the mixer of each block that an in-place config replaces, in float32.

    They are random if a seed is given (a different one for each block), else made from the block's attention.
    """
    values: Any = config
    make = _mamba2 if values.mixer == "mamba2" else _gated_delta
    return make(teacher, values, seed)


def _mamba2(teacher: PreTrainedModel, config: Any, seed: int | None) -> dict[int, dict[str, Tensor]]:
    settings, sizes = config.mixer_settings, attention_sizes(teacher.config)
    shape = MixerShape(
        width=config.hidden_size,
        heads=settings["mamba_n_heads"],
        channels=settings["mamba_d_head"],
        state=settings["mamba_d_state"],
        convolution=settings["mamba_d_conv"],
    )
    if seed is None:
        return {
            index: mixer_from_attention(attention_of(teacher, index), sizes, shape) for index in config.replaced_layers
        }
    drawn: dict[str, Any] = {"layers": config.num_hidden_layers, "spread": config.initializer_range}
    return {
        index: random_mixer(shape, seed=seed + index, device=teacher.device, **drawn)
        for index in config.replaced_layers
    }


def _gated_delta(teacher: PreTrainedModel, config: Any, seed: int | None) -> dict[int, dict[str, Tensor]]:
    settings, sizes = config.mixer_settings, attention_sizes(teacher.config)
    shape = MixerShape(
        width=config.hidden_size,
        heads=settings["linear_num_value_heads"],
        channels=settings["linear_value_head_dim"],
        state=settings["linear_key_head_dim"],
        convolution=settings["linear_conv_kernel_dim"],
    )
    drawn: dict[str, Any] = {"layers": config.num_hidden_layers, "spread": config.initializer_range}
    stats = activation_stats(teacher, config.replaced_layers) if seed is None else {}
    state = {}
    for index in config.replaced_layers:
        if seed is None:
            made = delta_from_attention(attention_of(teacher, index), sizes, shape, stats[index])
        else:
            made = random_delta(shape, seed=seed + index, device=teacher.device, **drawn)
        named = qwen3_5_mixer("", made)
        state[index] = {name.removeprefix(".linear_attn."): value for name, value in named.items()}
    return state
