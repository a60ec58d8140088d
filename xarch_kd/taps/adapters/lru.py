"""Real-gated linear recurrent unit of RecurrentGemma (De et al. 2024, https://arxiv.org/abs/2402.19427).

Channel state: h_t = a_t h_{t−1} + √(1 − a_t²) i_t x_t with log a = −8 r softplus(Λ), and r, i = σ(gates of x):
an `SSDMixing` of one state, with one head a channel. At the first token the root is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional

from xarch_kd.errors import TapError
from xarch_kd.mixing.ssd import SSDMixing
from xarch_kd.ops import checks
from xarch_kd.taps.adapters.base import MixerAdapter
from xarch_kd.taps.adapters.parts import accumulated, short_convolution
from xarch_kd.taps.valid_range import valid_range_of


def _build(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> SSDMixing:
    valid_range = valid_range_of(attention_mask, projected["linear_x"].device)
    if valid_range is not None:
        start = valid_range[:, 0]
        checks.require(
            ~(start > 0).any(),
            lambda: TapError(
                "This mixer takes padding for tokens: after padding on the left its output is no matrix of tokens.",
                asked=f"the mixing matrix of {type(mixer).__name__}",
                found=f"{int(start.max())} padding tokens at the start of a sequence",
                fix="pad on the right, or pack the rows",
            ),
        )
    unit = mixer.rg_lru
    values = _convolved(mixer, projected)
    forget = accumulated(_gate(values, unit.recurrent_gate_weight, unit.recurrent_gate_bias))
    log_decay = -8.0 * forget * functional.softplus(accumulated(unit.recurrent_param))
    # 1 - a² rounds to 0 for a channel without decay, where the root's gradient would be infinite.
    root = (1.0 - torch.exp(2.0 * log_decay)).clamp_min(torch.finfo(log_decay.dtype).tiny).sqrt()
    is_first = torch.arange(root.shape[1], device=root.device)[:, None] == 0
    ones = log_decay.new_ones(1, 1, 1, 1).expand(*log_decay.shape[:2], 1, 1)
    return SSDMixing(
        C=ones,
        B=ones,
        log_decay=log_decay,
        dt=torch.where(is_first, 1.0, root) * accumulated(_gate(values, unit.input_gate_weight, unit.input_gate_bias)),
        D=None,
        valid_range=valid_range,
    )


def _values(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> Tensor:
    return _convolved(mixer, projected).unsqueeze(-1)


def _convolved(mixer: Any, projected: Mapping[str, Tensor]) -> Tensor:
    return short_convolution(projected["linear_x"], mixer.conv_1d, nn.Identity())


def _gate(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """σ of a block-diagonal linear map [batch, time, channels]; weight [blocks, in, out], bias [blocks, out]."""
    blocks = rearrange(values, "b t (n i) -> b t n i", n=weight.shape[0])
    return rearrange(torch.sigmoid(einsum(blocks, weight, "b t n i, n i o -> b t n o") + bias), "b t n o -> b t (n o)")


RG_LRU: Final = MixerAdapter(projections=("linear_x",), build=_build, values=_values)
