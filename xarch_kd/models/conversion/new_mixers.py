"""Weights of the blocks whose attention is replaced: new mixers, and norms where the class differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.models.conversion.activation_stats import activation_stats
from xarch_kd.models.conversion.bamba import mamba2_shape
from xarch_kd.models.conversion.delta_mixers import delta_from_attention, random_delta
from xarch_kd.models.conversion.mixers import mixer_from_attention, random_mixer
from xarch_kd.models.conversion.olmo_hybrid import olmo_hybrid_mixer, olmo_hybrid_norms
from xarch_kd.models.conversion.qwen3_5 import delta_shape, qwen3_5_mixer
from xarch_kd.models.conversion.targets import Target
from xarch_kd.models.conversion.teacher_spec import TeacherSpec
from xarch_kd.models.conversion.weights import TeacherWeights


def new_mixers(
    teacher: PreTrainedModel,
    spec: TeacherSpec,
    target: Target,
    kept: Sequence[int],
    config: PreTrainedConfig,
    *,
    seed: int | None,
) -> dict[str, Tensor]:
    """Return the weights of the mixers of every block that is not kept, under their names in the student.

    They are random if a seed is given (a different one for each block), else made from the block's attention.
    """
    # A class with multipliers of its own scales what a mixer returns, but not the queries that a mixer reads.
    read_as = replace(target.read_as(spec), attention_scale=spec.attention_scale)
    weights = TeacherWeights(teacher, read_as)
    replaced = [index for index in range(spec.layers) if index not in kept]
    make = _mamba2 if target.mixer == "mamba2" else _gated_delta
    return make(teacher, weights, target, replaced, config, seed)


def _mamba2(
    teacher: PreTrainedModel,
    weights: TeacherWeights,
    target: Target,
    replaced: Sequence[int],
    config: PreTrainedConfig,
    seed: int | None,
) -> dict[str, Tensor]:
    shape, layers, state = mamba2_shape(config), weights.spec.layers, {}
    spread = config.to_dict()["initializer_range"]
    for index in replaced:
        if seed is None:
            made = mixer_from_attention(weights.block(index), weights.spec, shape)
        else:
            made = random_mixer(shape, layers=layers, spread=spread, seed=seed + index, device=teacher.device)
        state |= {f"model.layers.{index}.mamba.{name}": value for name, value in made.items()}
    return state


def _gated_delta(
    teacher: PreTrainedModel,
    weights: TeacherWeights,
    target: Target,
    replaced: Sequence[int],
    config: PreTrainedConfig,
    seed: int | None,
) -> dict[str, Tensor]:
    shape, layers, state = delta_shape(config), weights.spec.layers, {}
    spread = config.to_dict()["initializer_range"]
    needs_stats = seed is None or weights.spec.norm_after
    stats = activation_stats(teacher, replaced) if needs_stats else {}
    for index in replaced:
        block, place = weights.block(index), f"model.layers.{index}"
        if seed is None:
            made = delta_from_attention(block, weights.spec, shape, stats[index])
        else:
            made = random_delta(shape, layers=layers, spread=spread, seed=seed + index, device=teacher.device)
        if target.name == "olmo_hybrid":
            state |= olmo_hybrid_mixer(place, made) | olmo_hybrid_norms(place, block, stats[index])
        else:
            state |= qwen3_5_mixer(place, made)
    return state
