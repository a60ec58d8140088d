"""What a reader of a recurrent mixer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from xarch_kd.mixing.base import Mixing

# Stands among a reader's projections for the mixer itself, of which the input is kept.
OWN_INPUT: Final = ""


@dataclass(frozen=True, kw_only=True)
class MixerAdapter:
    """How the mixing matrix of one class of mixer is read from a forward pass over whole sequences, without a cache.

    `projections` are attribute paths in the mixer. The outputs [batch, time, dim] of these modules in the pass are
    `projected`, by path; all else is computed again from the mixer's parameters, because fused training kernels call
    no module but these. A mixer that uses a projection's weight without calling it has `OWN_INPUT` there: what it was
    itself called with. `attention_mask` [batch, time] is the one that the pass was given.

    `build(mixer, projected, attention_mask)` returns M, with gradients to all that it depends on;
    `values(mixer, projected, attention_mask)` returns what M is applied to, [batch, time, heads, dim], likewise.
    """

    projections: tuple[str, ...]
    build: Callable[[nn.Module, Mapping[str, Tensor], Tensor | None], Mixing]
    values: Callable[[nn.Module, Mapping[str, Tensor], Tensor | None], Tensor]
