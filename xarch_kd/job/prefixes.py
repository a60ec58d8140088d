"""Prefix sources of the stages of a run, with the token that ends a continuation."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from xarch_kd.errors import UsageError
from xarch_kd.job.models import RunModels
from xarch_kd.mapping_file.prefixes import Prefixes
from xarch_kd.planning.plan import Plan, StagePlan
from xarch_kd.run.processes import Processes
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.prefixes import PrefixMixture


def check_prefixes(plan: Plan, models: RunModels) -> None:
    """Raise UsageError if a stage samples and the two models end a text with different tokens."""
    for stage in plan.stages:
        settings = stage.stage.prefix_settings
        if settings is not None:
            end_tokens(settings, models.teacher, models.student, stage=stage.stage.name)


def stage_prefixes(plan: Plan, stage: StagePlan, aligner: Aligner, processes: Processes) -> PrefixMixture | None:
    """Return the prefix sources of a stage, None for data alone. Raises UsageError as `check_prefixes` does."""
    settings = stage.stage.prefix_settings
    if settings is None:
        return None
    teacher: Any = aligner.reader.layout.model
    return PrefixMixture(
        settings,
        aligner,
        seed=plan.mapping.seed,
        row_tokens=plan.mapping.data.sequence_length,
        end_of_sequence=end_tokens(settings, teacher, aligner.student, stage=stage.stage.name),
        processes=processes,
    )


def end_tokens(
    settings: Prefixes, teacher: PreTrainedModel, student: PreTrainedModel, *, stage: str
) -> tuple[int, ...]:
    """Return the token ids that end a continuation of either model, none if neither has one.

    Raises UsageError if they differ between the models and the stage does not name them, and for ids outside of a
    vocabulary.
    """
    own, other = _configured(student), _configured(teacher)
    if settings.end_of_sequence is None and own != other:
        raise UsageError(
            "teacher and student end a text with different tokens, so that continuations of one would not end for the "
            "other",
            asked=f"prefixes of stage '{stage}'",
            found=f"end-of-sequence ids {_shown(other)} of the teacher and {_shown(own)} of the student",
            fix=f"name the ids, prefixes: {{end_of_sequence: [{_shown(own | other)}]}}, or correct eos_token_id in the "
            "generation_config.json of one of them",
        )
    ends = other if settings.end_of_sequence is None else set(settings.end_of_sequence)
    rows = min(int(model.get_input_embeddings().weight.shape[0]) for model in (teacher, student))  # type: ignore[arg-type, operator, union-attr]
    if any(token >= rows for token in ends):
        raise UsageError(
            "an end-of-sequence id is outside of a model's vocabulary, so that it would never end a continuation",
            asked=f"prefixes of stage '{stage}'",
            found=f"ids {_shown(ends)}",
            allowed=f"0 to {rows - 1}, which both models have",
            fix="prefixes: {end_of_sequence: [ID]}",
        )
    return tuple(sorted(ends))


def _configured(model: PreTrainedModel) -> set[int]:
    settings = model.generation_config
    given = None if settings is None else settings.eos_token_id
    return set() if given is None else {given} if isinstance(given, int) else set(given)


def _shown(tokens: set[int]) -> str:
    return ", ".join(map(str, sorted(tokens))) or "none"
