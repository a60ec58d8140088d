"""Mamba-2 mixers (Dao and Gu 2024, https://arxiv.org/abs/2405.21060): M = exp(segment sums of δA) ∘ C Bᵀ δ + diag(D).

One projection yields the gate, the convolved x, B, C and the step δ = clamp(softplus(its last rows + dt_bias)).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN

from xarch_kd.mixing.ssd import SSDMixing
from xarch_kd.taps.adapters.base import MixerAdapter
from xarch_kd.taps.adapters.parts import accumulated, short_convolution
from xarch_kd.taps.valid_range import valid_range_of


def _split(mixer: Any, projected: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the projection of x [batch, time, channels], of B and C [batch, time, 2 groups states], and of δ."""
    whole = projected["in_proj"]
    # Only Falcon-H1 scales the projection's output.
    if hasattr(mixer, "mup_vector"):
        whole = whole * mixer.mup_vector
    sizes = [mixer.intermediate_size, mixer.intermediate_size, _states(mixer), mixer.num_heads]
    _, values, states, step = whole.split(sizes, dim=-1)
    return values, states, step


def _states(mixer: Any) -> int:
    return 2 * mixer.n_groups * mixer.ssm_state_size


def _build(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> SSDMixing:
    _, states, step = _split(mixer, projected)
    states = short_convolution(states, mixer.conv1d, ACT2FN[mixer.activation], slice(mixer.intermediate_size, None))
    key, query = rearrange(states, "b t (two g n) -> two b t g n", two=2, g=mixer.n_groups)
    return ssd_mixing(mixer, query, key, step, mixer.time_step_limit, attention_mask)


def ssd_mixing(
    mixer: Any,
    query: Tensor,
    key: Tensor,
    step: Tensor,
    limit: tuple[float, float],
    attention_mask: Tensor | None,
) -> SSDMixing:
    """Return the matrix of a mixer from the parts of its projection.

    C and B are `query` and `key` [batch, time, groups, states], after the convolution; `step` [batch, time, heads] is
    as projected, and `limit` clamps it after softplus. `dt_bias`, `A_log` and `D` have these names in transformers and
    in mamba_ssm.
    """
    # Summed in float32 as the fused kernels do; the plain implementation rounds the step to the model's dtype.
    step = functional.softplus(accumulated(step) + accumulated(mixer.dt_bias)).clamp(*limit)
    return SSDMixing(
        C=query,
        B=key,
        log_decay=-torch.exp(accumulated(mixer.A_log)) * step,
        dt=step,
        D=mixer.D,
        valid_range=valid_range_of(attention_mask, step.device),
    )


def _values(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> Tensor:
    values, _, _ = _split(mixer, projected)
    values = short_convolution(values, mixer.conv1d, ACT2FN[mixer.activation], slice(mixer.intermediate_size))
    return rearrange(values, "b t (h d) -> b t h d", h=mixer.num_heads)


MAMBA2: Final = MixerAdapter(projections=("in_proj",), build=_build, values=_values)
