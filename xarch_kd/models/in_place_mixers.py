"""First weights of mixers that are put into a teacher's own blocks, by the recipes for stock students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.models.delta_mixers import delta_from_attention, random_delta
from xarch_kd.models.in_place_attention import attention_of, attention_sizes
from xarch_kd.models.mixers import MixerShape, mixer_from_attention, random_mixer
from xarch_kd.models.moments import ROWS, TOKENS
from xarch_kd.models.qwen3_5 import qwen3_5_mixer
from xarch_kd.taps.trace import trace


@dataclass(frozen=True, kw_only=True)
class InputMoments:
    """`constant` [width]: constant · x is near 1 for every x that an attention reads."""

    constant: Tensor


def new_mixers(teacher: PreTrainedModel, config: PreTrainedConfig, *, seed: int | None) -> dict[int, dict[str, Tensor]]:
    """Return the state of the mixer of each block that an in-place config replaces, in float32.

    Mixers are random if a seed is given, another for each block, and made from the block's attention otherwise.
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
    moments = input_moments(teacher, config.replaced_layers) if seed is None else {}
    state = {}
    for index in config.replaced_layers:
        if seed is None:
            made = delta_from_attention(attention_of(teacher, index), sizes, shape, moments[index])
        else:
            made = random_delta(shape, seed=seed + index, device=teacher.device, **drawn)
        named = qwen3_5_mixer("", made)
        state[index] = {name.removeprefix(".linear_attn."): value for name, value in named.items()}
    return state


@torch.no_grad()
def input_moments(teacher: PreTrainedModel, layers: Sequence[int]) -> dict[int, InputMoments]:
    """Return moments of what the attention of each layer reads, measured as in `moments.py`, in any family."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, teacher.config.vocab_size, (ROWS, TOKENS), generator=generator).to(teacher.device)
    training = teacher.training
    try:
        teacher.eval()
        first, second = (trace(teacher, half, taps=["mixer_input"], layers=layers) for half in tokens.chunk(2))
    finally:
        teacher.train(training)
    moments = {}
    for layer in layers:
        mean, read = first["mixer_input"][layer].float().mean(dim=(0, 1)), second["mixer_input"][layer].float()
        along = read @ mean
        constant = mean * along.mean() / along.square().mean().clamp_min(1e-12)
        moments[layer] = InputMoments(constant=constant)
    return moments
