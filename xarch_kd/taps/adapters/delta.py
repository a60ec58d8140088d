"""Gated delta rule (Yang et al. 2024, https://arxiv.org/abs/2412.06464) and Kimi delta attention.

q and k are of unit length after a short convolution, q is scaled by 1/√dim, β = σ(b), and the log decay is
−exp(A_log) softplus(a + dt_bias): one value per head, or per key channel in Kimi delta attention
(https://arxiv.org/abs/2510.26692). Families differ in the layout of their projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN

from xarch_kd.mixing.delta import DeltaMixing
from xarch_kd.taps.adapters.base import MixerAdapter
from xarch_kd.taps.adapters.parts import accumulated, short_convolution, unit_length
from xarch_kd.taps.valid_range import valid_range_of

Projected = Mapping[str, Tensor]


def _mixing(
    mixer: Any, query_key: Tensor, beta: Tensor, log_decay: Tensor, head_dim: int, attention_mask: Tensor | None
) -> DeltaMixing:
    """M from q and k before the convolution [batch, time, 2 heads dim], β [batch, time, heads] and the log decay."""
    channels = slice(query_key.shape[-1])
    query_key = short_convolution(query_key, mixer.conv1d, ACT2FN[mixer.activation], channels)
    query, key = unit_length(rearrange(query_key, "b t (two h d) -> two b t h d", two=2, d=head_dim))
    served = beta.shape[-1] // query.shape[2]
    return DeltaMixing(
        query=repeat(query, "b t h d -> b t (h served) d", served=served),
        key=repeat(key, "b t h d -> b t (h served) d", served=served),
        beta=accumulated(beta),
        log_decay=log_decay,
        scale=head_dim**-0.5,
        valid_range=valid_range_of(attention_mask, query.device),
    )


def _gated(mixer: Any, query_key: Tensor, a: Tensor, beta: Tensor, attention_mask: Tensor | None) -> DeltaMixing:
    step = functional.softplus(accumulated(a) + accumulated(mixer.dt_bias))
    log_decay = -torch.exp(accumulated(mixer.A_log)) * step
    return _mixing(mixer, query_key, beta, log_decay, mixer.head_k_dim, attention_mask)


def _heads_of_values(mixer: Any, values: Tensor, head_dim: int) -> Tensor:
    channels = slice(mixer.conv_dim - values.shape[-1], None)
    values = short_convolution(values, mixer.conv1d, ACT2FN[mixer.activation], channels)
    return rearrange(values, "b t (h d) -> b t h d", d=head_dim)


def _build_qwen3_next(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> DeltaMixing:
    query, key, _, _, b, a = mixer.fix_query_key_value_ordering(projected["in_proj_qkvz"], projected["in_proj_ba"])
    query_key = torch.cat((query.flatten(2), key.flatten(2)), dim=-1)
    return _gated(mixer, query_key, a, b.sigmoid(), attention_mask)


def _values_qwen3_next(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> Tensor:
    ordered = mixer.fix_query_key_value_ordering(projected["in_proj_qkvz"], projected["in_proj_ba"])
    return _heads_of_values(mixer, ordered[2].flatten(2), mixer.head_v_dim)


def _build_qwen3_5(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> DeltaMixing:
    query_key = projected["in_proj_qkv"][..., : 2 * mixer.key_dim]
    return _gated(mixer, query_key, projected["in_proj_a"], projected["in_proj_b"].sigmoid(), attention_mask)


def _values_qwen3_5(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> Tensor:
    return _heads_of_values(mixer, projected["in_proj_qkv"][..., 2 * mixer.key_dim :], mixer.head_v_dim)


def _build_olmo_hybrid(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> DeltaMixing:
    query_key = torch.cat((projected["q_proj"], projected["k_proj"]), dim=-1)
    beta = projected["b_proj"].sigmoid() * (2.0 if mixer.allow_neg_eigval else 1.0)
    return _gated(mixer, query_key, projected["a_proj"], beta, attention_mask)


def _values_olmo_hybrid(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> Tensor:
    return _heads_of_values(mixer, projected["v_proj"], mixer.head_v_dim)


def _build_kimi(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> DeltaMixing:
    gate = mixer.forget_gate
    step = functional.softplus(accumulated(projected["forget_gate.f_b_proj"]) + accumulated(gate.dt_bias))
    step = rearrange(step, "b t (h d) -> b t h d", d=mixer.head_dim)
    log_decay = -torch.exp(accumulated(gate.A_log)) * step
    query_key = torch.cat((projected["q_proj"], projected["k_proj"]), dim=-1)
    return _mixing(mixer, query_key, projected["b_proj"].sigmoid(), log_decay, mixer.head_dim, attention_mask)


def _values_kimi(mixer: Any, projected: Projected, attention_mask: Tensor | None) -> Tensor:
    return _heads_of_values(mixer, projected["v_proj"], mixer.head_dim)


QWEN3_NEXT: Final = MixerAdapter(
    projections=("in_proj_qkvz", "in_proj_ba"), build=_build_qwen3_next, values=_values_qwen3_next
)
QWEN3_5: Final = MixerAdapter(
    projections=("in_proj_qkv", "in_proj_a", "in_proj_b"), build=_build_qwen3_5, values=_values_qwen3_5
)
OLMO_HYBRID: Final = MixerAdapter(
    projections=("q_proj", "k_proj", "v_proj", "a_proj", "b_proj"), build=_build_olmo_hybrid, values=_values_olmo_hybrid
)
KIMI_LINEAR: Final = MixerAdapter(
    projections=("q_proj", "k_proj", "v_proj", "b_proj", "forget_gate.f_b_proj"),
    build=_build_kimi,
    values=_values_kimi,
)
