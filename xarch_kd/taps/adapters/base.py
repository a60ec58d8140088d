"""Adapter of a recurrent mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from xarch_kd.mixing.base import Mixing

# In an adapter's projections: record the mixer's own input.
OWN_INPUT: Final = ""


@dataclass(frozen=True, kw_only=True)
class MixerAdapter:
    """Adapter that builds the mixing matrix of one class of mixer from a forward pass without a cache.

    `projections` are attribute paths in the mixer. The outputs [batch, time, dim] of these modules in the pass are
    `projected`, by path; the rest is recomputed from the mixer's parameters, because fused training kernels call only
    these modules. A mixer that uses a projection's weight without calling it has `OWN_INPUT` there: its own input.
    `attention_mask` [batch, time] is that of the pass.

    `build(mixer, projected, attention_mask)` returns M, with gradients to all its inputs and parameters;
    `values(mixer, projected, attention_mask)` returns the values of M, [batch, time, heads, dim], likewise.
    """

    projections: tuple[str, ...]
    build: Callable[[nn.Module, Mapping[str, Tensor], Tensor | None], Mixing]
    values: Callable[[nn.Module, Mapping[str, Tensor], Tensor | None], Tensor]
