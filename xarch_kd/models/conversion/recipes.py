"""Mixers that can replace attention: sizes, and recipes of their first weights, in one table by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from xarch_kd.models.conversion.activation_stats import ActivationStats
from xarch_kd.models.conversion.bamba import mamba2_fields, mamba2_shape
from xarch_kd.models.conversion.delta_mixers import delta_from_attention, random_delta
from xarch_kd.models.conversion.mixers import MixerShape, mixer_from_attention, random_mixer
from xarch_kd.models.conversion.qwen3_5 import delta_fields, delta_shape
from xarch_kd.models.conversion.teacher_spec import AttentionSpec
from xarch_kd.models.conversion.weights import AttentionWeights

FromAttention = Callable[[AttentionWeights, AttentionSpec, MixerShape, ActivationStats | None], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class MixerRecipe:
    """First weights of one kind of mixer, in float32 under names of its own, which each student class translates.

    `fields` returns the entries of a student's config that size the mixers for a teacher's attention, and `shape` reads
    them back from a config's values. `from_attention` starts from the attention that is replaced; with `needs_stats` it
    reads the activation statistics of the teacher's block. `random` draws weights as the mixer's authors do.
    """

    fields: Callable[[AttentionSpec], dict[str, Any]]
    shape: Callable[[Mapping[str, Any]], MixerShape]
    from_attention: FromAttention
    random: Callable[..., dict[str, Tensor]]
    needs_stats: bool = False

    def first_weights(
        self,
        block: AttentionWeights,
        spec: AttentionSpec,
        shape: MixerShape,
        stats: ActivationStats | None,
        *,
        layers: int,
        spread: float,
        seed: int | None,
        device: torch.device,
    ) -> dict[str, Tensor]:
        """Return the state of one mixer: random with a seed, else made from the block's attention."""
        if seed is None:
            return self.from_attention(block, spec, shape, stats)
        return self.random(shape, layers=layers, spread=spread, seed=seed, device=device)


def _mamba2(
    block: AttentionWeights, spec: AttentionSpec, shape: MixerShape, stats: ActivationStats | None
) -> dict[str, Tensor]:
    return mixer_from_attention(block, spec, shape, None if stats is None else stats.constant)


def _gated_delta(
    block: AttentionWeights, spec: AttentionSpec, shape: MixerShape, stats: ActivationStats | None
) -> dict[str, Tensor]:
    assert stats is not None
    return delta_from_attention(block, spec, shape, stats)


RECIPES: Final[Mapping[str, MixerRecipe]] = {
    "mamba2": MixerRecipe(fields=mamba2_fields, shape=mamba2_shape, from_attention=_mamba2, random=random_mixer),
    "gated_delta": MixerRecipe(
        fields=delta_fields, shape=delta_shape, from_attention=_gated_delta, random=random_delta, needs_stats=True
    ),
}
