"""Lightning attention of MiniMax (https://arxiv.org/abs/2501.08313): M = (q kᵀ) ∘ exp(−slope (i − j)), slope fixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from einops import rearrange, repeat
from torch import Tensor

from xarch_kd.mixing.linear import LinearMixing
from xarch_kd.taps.adapters.base import MixerAdapter
from xarch_kd.taps.valid_range import valid_range_of


def _heads(mixer: Any, projected: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [batch, time, heads, dim]; a head's three are side by side in the projection."""
    heads = rearrange(
        mixer.act_fn(projected["qkv_proj"]),
        "b t (h three d) -> three b t h d",
        three=3,
        h=mixer.num_attention_heads,
    )
    return heads[0], heads[1], heads[2]


def _build(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> LinearMixing:
    query, key, _ = _heads(mixer, projected)
    batch, time = query.shape[:2]
    return LinearMixing(
        query=query,
        key=key,
        log_decay=repeat(-mixer.slope_rate.float(), "h 1 1 -> b t h", b=batch, t=time),
        valid_range=valid_range_of(attention_mask, query.device),
    )


def _values(mixer: Any, projected: Mapping[str, Tensor], attention_mask: Tensor | None) -> Tensor:
    return _heads(mixer, projected)[2]


LIGHTNING: Final = MixerAdapter(projections=("qkv_proj",), build=_build, values=_values)
