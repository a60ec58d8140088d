"""From a Transformer teacher to a stock hybrid student whose kept blocks are the teacher's, exactly."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import BambaConfig, PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import ConversionError
from xarch_kd.models.bamba import bamba_config, bamba_state, mixer_shape
from xarch_kd.models.check import check_logits, runnable
from xarch_kd.models.facts import TeacherFacts, teacher_facts
from xarch_kd.models.keep import kept_layers
from xarch_kd.models.mixers import mixer_from_attention, random_mixer
from xarch_kd.models.weights import TeacherWeights, check_finite

Selection = str | Sequence[int] | None

NO_ATTENTION = (
    "No block keeps its attention: generation with a cache fails in a stock class whose blocks are all recurrent "
    "(use_cache=False works). Keep at least one attention block if the student is to generate."
)


def convert(
    teacher: PreTrainedModel,
    *,
    mixer: str = "mamba2",
    keep_attention: Selection = None,
    replace: Selection = None,
    target: str = "auto",
    initialisation: Literal["attention", "random"] = "attention",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    check: bool = True,
) -> PreTrainedModel:
    """Return a stock student: a copy of the teacher whose blocks outside `keep_attention` have a new mixer.

    The new mixers start from the attention they replace (`mixers.py` has the recipe) or, seeded, at random. The
    teacher is not changed and shares no tensor with the student. With `check` the conversion ends with the comparison
    of logits in `check.py`. Raises `UsageError` for a selection that does not fit, `ConversionError` for a teacher
    that no stock class holds or a conversion that is not exact; warns if no attention is left.
    """
    _check_names(mixer, target)
    if initialisation not in ("attention", "random"):
        raise ConversionError("There is no such initialisation.", asked=initialisation, allowed="attention, random")
    facts = teacher_facts(teacher.config)
    kept = kept_layers(facts.layers, keep_attention=keep_attention, replace=replace)
    config = bamba_config(facts, kept, teacher.config)
    if len(kept) == 0:
        warnings.warn(NO_ATTENTION, UserWarning, stacklevel=2)
    if check:
        check_logits(teacher, facts, kept)
    weights = TeacherWeights(teacher, facts)
    state = {name: value.to(dtype, copy=True) for name, value in bamba_state(weights, kept).items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for index in (index for index in range(facts.layers) if index not in kept):
        made = _mixer(weights, config, index, seed if initialisation == "random" else None, teacher.device)
        state |= {f"model.layers.{index}.mamba.{name}": value.to(dtype) for name, value in made.items()}
    if weights.unread():
        raise ConversionError("The teacher has weights that the student has no place for.", found=weights.unread()[:4])
    check_finite(state, what="The converted student")
    config.dtype = dtype
    student = runnable(config, state, teacher.device).requires_grad_(True)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _mixer(
    weights: TeacherWeights, config: BambaConfig, index: int, seed: int | None, device: torch.device
) -> dict[str, Tensor]:
    """Return the state of the mixer of block `index`: random if a seed is given, else from its attention."""
    shape = mixer_shape(config)
    if seed is None:
        return mixer_from_attention(weights.block(index), weights.facts, shape)
    spread = config.initializer_range
    return random_mixer(shape, layers=weights.facts.layers, spread=spread, seed=seed + index, device=device)


def student_config(
    teacher: PreTrainedConfig,
    *,
    mixer: str = "mamba2",
    keep_attention: Selection = None,
    replace: Selection = None,
    target: str = "auto",
) -> PreTrainedConfig:
    """Return the config of the student that `convert` would build; no weights are needed.

    Raises `UsageError` for a selection that does not fit, `ConversionError` for a teacher that no stock class holds.
    """
    _check_names(mixer, target)
    facts = teacher_facts(teacher)
    kept = kept_layers(facts.layers, keep_attention=keep_attention, replace=replace)
    return bamba_config(facts, kept, teacher)


def conversion_warnings(
    teacher: PreTrainedConfig,
    *,
    keep_attention: Selection = None,
    replace: Selection = None,
) -> tuple[str, ...]:
    """Return what a user should know before converting: one sentence each."""
    facts = teacher_facts(teacher)
    kept = kept_layers(facts.layers, keep_attention=keep_attention, replace=replace)
    return tuple(_warnings(facts, kept))


def _warnings(facts: TeacherFacts, kept: Sequence[int]) -> list[str]:
    found = []
    if len(kept) == 0:
        found.append(NO_ATTENTION)
    if len(kept) == facts.layers:
        found.append("Every block keeps its attention: the student is the teacher in another class.")
    if facts.tied and facts.is_scaled:
        found.append(
            f"The teacher's multipliers are folded into its weights, which unties the head: "
            f"{facts.vocabulary * facts.width:,} more parameters."
        )
    if facts.activation not in ("silu", "swish") and len(kept) < facts.layers:
        found.append(
            f"The mixers' convolutions use the teacher's activation {facts.activation}, which the fused Mamba-2 "
            "training kernels refuse; the PyTorch path runs it."
        )
    return found


def _check_names(mixer: str, target: str) -> None:
    if mixer != "mamba2":
        raise ConversionError("There is no conversion to this mixer.", asked=mixer, allowed="mamba2")
    if target not in ("auto", "bamba"):
        raise ConversionError("There is no conversion to this class.", asked=target, allowed="auto, bamba")
