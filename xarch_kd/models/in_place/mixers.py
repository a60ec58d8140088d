"""Initial weights of mixers in a teacher's own blocks, by the recipes for stock students."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.models.conversion.activation_stats import activation_stats
from xarch_kd.models.conversion.qwen3_5 import qwen3_5_mixer
from xarch_kd.models.conversion.recipes import RECIPES
from xarch_kd.models.in_place.attention import attention_of, attention_sizes


def _as_in_bamba(made: dict[str, Tensor]) -> dict[str, Tensor]:
    return made


def _as_in_qwen3_5(made: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(".linear_attn."): value for name, value in qwen3_5_mixer("", made).items()}


# Mixer -> the names of its weights in the module that `classes.MIXER_CLASSES` has for it.
IN_PLACE_NAMES: Final[Mapping[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "mamba2": _as_in_bamba,
    "gated_delta": _as_in_qwen3_5,
}


def new_mixers(teacher: PreTrainedModel, config: PreTrainedConfig, *, seed: int | None) -> dict[int, dict[str, Tensor]]:
    """Return the state of the mixer of each block that an in-place config replaces, in float32.

    They are random if a seed is given (a different one for each block), else made from the block's attention.
    """
    values: Any = config
    recipe, sizes = RECIPES[values.mixer], attention_sizes(teacher.config)
    shape = recipe.shape({**values.mixer_settings, "hidden_size": values.hidden_size})
    stats = activation_stats(teacher, values.replaced_layers) if seed is None and recipe.needs_stats else {}
    return {
        index: IN_PLACE_NAMES[values.mixer](
            recipe.first_weights(
                attention_of(teacher, index),
                sizes,
                shape,
                stats.get(index),
                layers=values.num_hidden_layers,
                spread=values.initializer_range,
                seed=None if seed is None else seed + index,
                device=teacher.device,
            )
        )
        for index in values.replaced_layers
    }
