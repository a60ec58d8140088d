"""From a Transformer teacher to a stock hybrid student whose kept blocks are the teacher's, exactly."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import ConversionError, renamed_arguments
from xarch_kd.models.conversion.check import check_logits, runnable
from xarch_kd.models.conversion.frozen_parameters import frozen_in_blocks
from xarch_kd.models.conversion.layer_selection import kept_layers
from xarch_kd.models.conversion.new_mixers import new_mixers
from xarch_kd.models.conversion.targets import Target, choose_target
from xarch_kd.models.conversion.teacher_spec import TeacherFacts, teacher_facts
from xarch_kd.models.conversion.weights import TeacherWeights, check_finite

Selection = str | Sequence[int] | None

IN_PLACE = "in_place"

NO_ATTENTION = (
    "No block keeps its attention: generation with a cache fails in a stock class whose blocks are all recurrent "
    "(use_cache=False works). Keep at least one attention block if the student is to generate."
)


@renamed_arguments(initialisation="init")
def convert(
    teacher: PreTrainedModel,
    *,
    mixer: str = "mamba2",
    keep_attention: Selection = None,
    replace: Selection = None,
    target: str = "auto",
    init: Literal["attention", "random"] = "attention",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    check: bool = True,
) -> PreTrainedModel:
    """Return a stock student: a copy of the teacher whose blocks outside `keep_attention` have a new mixer.

    `mixer` is `mamba2` or `gated_delta`; `target` a stock class that has it (`targets.py`), `auto` for the one that
    fits best, or `in_place` for the teacher's own class with new mixers, which is not stock (`in_place.py`). The new
    mixers start from the attention they replace (`mixers.py` and `delta_mixers.py` have the recipes) or, seeded, at
    random. The teacher is not changed and shares no tensor with the student. With `check` the conversion ends with the
    comparison of logits in `check.py`. What `frozen_names` tells of the student has its gradient turned off. Raises
    `UsageError` for a selection that does not fit, `ConversionError` for a teacher that the class does not hold or a
    conversion that is not exact; warns if no attention is left.
    """
    if init not in ("attention", "random"):
        raise ConversionError("There is no such init.", asked=init, allowed="attention, random")
    if target == IN_PLACE:
        from xarch_kd.models.in_place.convert import convert_in_place

        layers = _replaced(teacher.config, keep_attention, replace)
        return convert_in_place(teacher, layers=layers, mixer=mixer, init=init, seed=seed, dtype=dtype, check=check)
    facts = teacher_facts(teacher.config)
    chosen = choose_target(facts, mixer=mixer, target=target)
    kept = kept_layers(facts.layers, keep_attention=keep_attention, replace=replace)
    config = chosen.config(facts, kept, teacher.config)
    if len(kept) == 0:
        warnings.warn(NO_ATTENTION, UserWarning, stacklevel=2)
    if check:
        check_logits(teacher, facts, kept, chosen)
    weights = TeacherWeights(teacher, chosen.read_as(facts))
    made = chosen.state(weights, kept)
    if weights.unread():
        raise ConversionError("The teacher has weights that the student has no place for.", found=weights.unread()[:4])
    made |= new_mixers(teacher, facts, chosen, kept, config, seed=seed if init == "random" else None)
    state = {name: value.to(dtype, copy=True) for name, value in made.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    check_finite(state, what="The converted student")
    config.dtype = dtype
    student = runnable(config, state, teacher.device).requires_grad_(True)
    for name in frozen_in_blocks(facts, chosen, kept):
        student.get_parameter(name).requires_grad_(False)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


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
    if target == IN_PLACE:
        from xarch_kd.models.in_place.convert import in_place_config

        return in_place_config(teacher, layers=_replaced(teacher, keep_attention, replace), mixer=mixer)
    facts = teacher_facts(teacher)
    chosen = choose_target(facts, mixer=mixer, target=target)
    kept = kept_layers(facts.layers, keep_attention=keep_attention, replace=replace)
    return chosen.config(facts, kept, teacher)


def conversion_warnings(
    teacher: PreTrainedConfig,
    *,
    mixer: str = "mamba2",
    keep_attention: Selection = None,
    replace: Selection = None,
    target: str = "auto",
) -> tuple[str, ...]:
    """Return what a user should know before converting: one sentence each."""
    if target == IN_PLACE:
        from xarch_kd.models.in_place.convert import ALL_RECURRENT, NEEDS_PACKAGE

        replaced = _replaced(teacher, keep_attention, replace)
        all_recurrent = len(replaced) == teacher.num_hidden_layers  # type: ignore[attr-defined]
        return (NEEDS_PACKAGE, ALL_RECURRENT) if all_recurrent else (NEEDS_PACKAGE,)
    facts = teacher_facts(teacher)
    kept = kept_layers(facts.layers, keep_attention=keep_attention, replace=replace)
    return tuple(_warnings(facts, choose_target(facts, mixer=mixer, target=target), kept))


def planned_frozen_names(
    teacher: PreTrainedConfig,
    *,
    mixer: str = "mamba2",
    keep_attention: Selection = None,
    replace: Selection = None,
    target: str = "auto",
) -> tuple[str, ...]:
    """Return the parameters of the student that `convert` would build which must stay as they are; often none."""
    if target == IN_PLACE:
        return ()
    facts = teacher_facts(teacher)
    kept = kept_layers(facts.layers, keep_attention=keep_attention, replace=replace)
    return frozen_in_blocks(facts, choose_target(facts, mixer=mixer, target=target), kept)


def _replaced(teacher: PreTrainedConfig, keep_attention: Selection, replace: Selection) -> list[int]:
    count: int = teacher.num_hidden_layers  # type: ignore[attr-defined]  # a field of every family's config
    kept = kept_layers(count, keep_attention=keep_attention, replace=replace)
    return [index for index in range(count) if index not in kept]


def _warnings(facts: TeacherFacts, target: Target, kept: Sequence[int]) -> list[str]:
    found = []
    replaced = facts.layers - len(kept)
    if len(kept) == 0:
        found.append(NO_ATTENTION)
    if replaced == 0:
        found.append("Every block keeps its attention: the student is the teacher in another class.")
    if target.fit(facts) == "frozen":
        found.append(
            f"The teacher has no query and key norms and {target.name} does: they are made linear by scaling, which "
            "holds in float32 and bfloat16 but not in float16, and only while the queries, keys and their norms of the "
            "kept blocks stay frozen. The student is best seen as an initialisation."
        )
    if facts.tied and facts.is_scaled and not _has_multipliers(facts, target):
        found.append(
            f"The teacher's multipliers are folded into its weights, which unties the head: "
            f"{facts.vocabulary * facts.width:,} more parameters."
        )
    if facts.activation not in ("silu", "swish") and replaced > 0:
        found.append(
            f"The mixers' convolutions use the teacher's activation {facts.activation}, which the fused training "
            "kernels refuse; the PyTorch path runs it."
        )
    if facts.norm_after and replaced > 0:
        found.append(
            "In a replaced block the norms precede mixer and MLP, where the teacher's follow them: its MLP starts near "
            "the teacher's and not equal to it."
        )
    if facts.norm_after and replaced == 0:
        found.append("The class demands a recurrent block, so one that adds nothing is appended.")
    return found


def _has_multipliers(facts: TeacherFacts, target: Target) -> bool:
    return not target.read_as(facts).is_scaled
