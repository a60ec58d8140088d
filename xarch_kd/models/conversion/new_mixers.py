"""Weights of the blocks whose attention is replaced: new mixers, and norms where the class differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.models.conversion.activation_stats import activation_stats
from xarch_kd.models.conversion.recipes import RECIPES
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
    weights, recipe, sizes = TeacherWeights(teacher, read_as), RECIPES[target.mixer], config.to_dict()
    replaced = [index for index in range(spec.layers) if index not in kept]
    shape = recipe.shape(sizes)
    needs_stats = target.needs_stats or (seed is None and (recipe.needs_stats or not shape.proj_bias))
    stats = activation_stats(teacher, replaced) if needs_stats else {}
    state: dict[str, Tensor] = {}
    for index in replaced:
        block, own = weights.block(index), stats.get(index)
        made = recipe.first_weights(
            block,
            weights.spec,
            shape,
            own,
            layers=spec.layers,
            spread=sizes["initializer_range"],
            seed=None if seed is None else seed + index,
            device=teacher.device,
        )
        state |= target.mixer_state(f"model.layers.{index}", made, block, own)
    return state
