"""Mamba-1 mixers (Gu and Dao 2023, https://arxiv.org/abs/2312.00752): one matrix per channel, each with its own state.

B, C and the step δ = softplus(dt_proj(low rank) + bias) come from the convolved x itself. Falcon-Mamba (without
weights) and Jamba (with them) normalize all three first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN

from xarch_kd.mixing.selective import SelectiveMixing
from xarch_kd.taps.adapters.base import MixerAdapter
from xarch_kd.taps.adapters.parts import accumulated, short_convolution
from xarch_kd.taps.valid_range import valid_range_of


def _build(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> SelectiveMixing:
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    rank, key, query = mixer.x_proj(_convolved(mixer, projected)).split(sizes, dim=-1)
    if hasattr(mixer, "dt_layernorm"):
        rank, key, query = mixer.dt_layernorm(rank), mixer.b_layernorm(key), mixer.c_layernorm(query)
    return selective_mixing(mixer, rank, key, query, attention_mask)


def selective_mixing(
    mixer: Any, rank: Tensor, key: Tensor, query: Tensor, attention_mask: Tensor | None
) -> SelectiveMixing:
    """Return the matrix of a mixer from the parts of its projection of x.

    The mixer's `dt_proj` maps `rank` [batch, time, rank] to the step; `key` and `query` are B and C [batch, time,
    states]. `dt_proj`, `A_log` and `D` have these names in transformers and in mamba_ssm.
    """
    step = accumulated(functional.linear(rank, mixer.dt_proj.weight)) + accumulated(mixer.dt_proj.bias)
    return SelectiveMixing(
        C=query,
        B=key,
        dt=functional.softplus(step),
        A=-torch.exp(accumulated(mixer.A_log)),
        D=mixer.D,
        valid_range=valid_range_of(attention_mask, rank.device),
    )


def _values(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> Tensor:
    return _convolved(mixer, projected).unsqueeze(-1)


def _convolved(mixer: Any, projected: Mapping[str, Tensor]) -> Tensor:
    return short_convolution(
        projected["in_proj"][..., : mixer.intermediate_size], mixer.conv1d, ACT2FN[mixer.activation]
    )


def _build_in_heads(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> SelectiveMixing:
    values = rearrange(_convolved_in_heads(mixer, projected), "b t (h d) -> b t h d", h=mixer.n_mamba_heads)
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    read = einsum(values, mixer.x_proj_weight, "b t h d, h r d -> b t h r")
    rank, key, query = read.split(sizes, dim=-1)
    step = accumulated(einsum(rank, mixer.dt_proj_weight, "b t h r, h d r -> b t h d")) + accumulated(
        mixer.dt_proj_bias
    )
    return SelectiveMixing(
        C=query,
        B=key,
        dt=rearrange(functional.softplus(step), "b t h d -> b t (h d)"),
        A=rearrange(-torch.exp(accumulated(mixer.A_log)), "h d n -> (h d) n"),
        D=rearrange(mixer.D, "h d -> (h d)"),
        valid_range=valid_range_of(attention_mask, rank.device),
    )


def _values_in_heads(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> Tensor:
    return _convolved_in_heads(mixer, projected).unsqueeze(-1)


def _convolved_in_heads(mixer: Any, projected: Mapping[str, Tensor]) -> Tensor:
    # Zamba's projection alternates between a channel of x and one of the gate.
    return short_convolution(projected["in_proj"][..., ::2], mixer.conv1d, ACT2FN[mixer.activation])


MAMBA: Final = MixerAdapter(projections=("in_proj",), build=_build, values=_values)
ZAMBA: Final = MixerAdapter(projections=("in_proj",), build=_build_in_heads, values=_values_in_heads)
