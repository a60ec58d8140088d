"""Gated short convolution of LFM2 and LFM3: y = C ∘ (w ∗ (B ∘ x)), one banded matrix per channel.

A bias of the convolution is not part of the matrix: it adds C ∘ bias to y, independently of x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from xarch_kd.mixing.banded import BandedMixing
from xarch_kd.taps.adapters.base import MixerAdapter
from xarch_kd.taps.valid_range import valid_range_of


def _build(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> BandedMixing:
    column_scale, row_scale, _ = projected["in_proj"].chunk(3, dim=-1)
    return BandedMixing(
        taps=mixer.conv.weight.squeeze(1).flip(-1),
        row_scale=row_scale,
        column_scale=column_scale,
        valid_range=valid_range_of(attention_mask, row_scale.device),
    )


def _values(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> Tensor:
    return projected["in_proj"].chunk(3, dim=-1)[2].unsqueeze(-1)


SHORT_CONVOLUTION: Final = MixerAdapter(projections=("in_proj",), build=_build, values=_values)
