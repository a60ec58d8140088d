"""Adapters of the mixers of package mamba_ssm: matrices as in the stock classes, with other attribute names.

Mamba multiplies by its projection's weight without calling the projection, and attention may write rotary positions
into the projection's output, so for these two the mixer's own input is recorded and projected again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from xarch_kd.errors import TapError
from xarch_kd.mixing.selective import SelectiveMixing
from xarch_kd.mixing.softmax import SoftmaxMixing
from xarch_kd.mixing.ssd import SSDMixing
from xarch_kd.taps.adapters.base import OWN_INPUT, MixerAdapter
from xarch_kd.taps.adapters.mamba import selective_mixing
from xarch_kd.taps.adapters.mamba2 import ssd_mixing
from xarch_kd.taps.adapters.parts import short_convolution
from xarch_kd.taps.valid_range import valid_range_of

Projected = Mapping[str, Tensor]


def _mamba2_parts(mixer: Any, projected: Projected) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the projection of x [batch, time, channels], of B and C [batch, time, 2 groups states], and of δ."""
    states = 2 * mixer.ngroups * mixer.d_state
    # Channels outside the state space, if any, come first; they and z are not part of the matrix.
    last = projected["in_proj"][..., -(mixer.d_ssm + states + mixer.nheads) :]
    values, read, step = last.split([mixer.d_ssm, states, mixer.nheads], dim=-1)
    return values, read, step


def _build_mamba2(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> SSDMixing:
    if mixer.D_has_hdim:
        raise TapError(
            "The mixing matrix of a Mamba-2 mixer whose D differs by channel is not one matrix per head.",
            found="D_has_hdim: True",
            fix="read mixer_output instead",
        )
    _, states, step = _mamba2_parts(mixer, projected)
    states = short_convolution(states, mixer.conv1d, functional.silu, slice(mixer.d_ssm, None))
    key, query = rearrange(states, "b t (two g n) -> two b t g n", two=2, g=mixer.ngroups)
    return ssd_mixing(mixer, query, key, step, mixer.dt_limit, attention_mask)


def _mamba2_values(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> Tensor:
    values, _, _ = _mamba2_parts(mixer, projected)
    values = short_convolution(values, mixer.conv1d, functional.silu, slice(mixer.d_ssm))
    return rearrange(values, "b t (h d) -> b t h d", h=mixer.nheads)


def _mamba_convolved(mixer: Any, projected: Projected) -> Tensor:
    weight, bias = mixer.in_proj.weight[: mixer.d_inner], mixer.in_proj.bias
    values = functional.linear(projected[OWN_INPUT], weight, None if bias is None else bias[: mixer.d_inner])
    return short_convolution(values, mixer.conv1d, functional.silu)


def _build_mamba(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> SelectiveMixing:
    read = mixer.x_proj(_mamba_convolved(mixer, projected))
    rank, key, query = read.split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    return selective_mixing(mixer, rank, key, query, attention_mask)


def _mamba_values(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> Tensor:
    return _mamba_convolved(mixer, projected).unsqueeze(-1)


def _query_and_pair(mixer: Any, projected: Projected) -> tuple[Tensor, Tensor]:
    """Queries [batch, time, heads, dim], and keys and values [batch, time, 2, key heads, dim], unrotated."""
    whole = functional.linear(projected[OWN_INPUT], mixer.in_proj.weight, mixer.in_proj.bias)
    sizes = [mixer.num_heads * mixer.head_dim, 2 * mixer.num_heads_kv * mixer.head_dim]
    whole = whole[..., : sum(sizes)]
    if mixer.d_conv > 0:
        whole = short_convolution(whole, mixer.conv1d, nn.Identity())
    query, pair = whole.split(sizes, dim=-1)
    pair = rearrange(pair, "b t (two h d) -> b t two h d", two=2, d=mixer.head_dim)
    return rearrange(query, "b t (h d) -> b t h d", d=mixer.head_dim), pair


def _build_attention(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> SoftmaxMixing:
    query, pair = _query_and_pair(mixer, projected)
    if mixer.rotary_emb_dim > 0:
        # With the mixer's own module, which may write into its input.
        query, pair = mixer.rotary_emb(query, pair.clone(), seqlen_offset=0, max_seqlen=None)
    scale = mixer.softmax_scale
    return SoftmaxMixing(
        query=query,
        key=pair[:, :, 0],
        scale=mixer.head_dim**-0.5 if scale is None else scale,
        causal=mixer.causal,
        valid_range=valid_range_of(attention_mask, query.device),
    )


def _attention_values(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> Tensor:
    _, pair = _query_and_pair(mixer, projected)
    return pair[:, :, 1]


# By the name of the class in mamba_ssm.
MAMBA_SSM_ADAPTERS: Final[dict[str, MixerAdapter]] = {
    "Mamba2": MixerAdapter(projections=("in_proj",), build=_build_mamba2, values=_mamba2_values),
    "Mamba": MixerAdapter(projections=(OWN_INPUT,), build=_build_mamba, values=_mamba_values),
    "MHA": MixerAdapter(projections=(OWN_INPUT,), build=_build_attention, values=_attention_values),
}
