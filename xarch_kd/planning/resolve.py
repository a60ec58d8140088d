"""From a mapping file to a plan: both configs are read, no weights, and all problems are reported at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from xarch_kd.errors import check_table
from xarch_kd.mapping_file.load import load_mapping
from xarch_kd.mapping_file.python_values import mapping_as_yaml, mapping_from
from xarch_kd.mapping_file.schema import Control, MappingFile, MixerName, Stage, TargetName
from xarch_kd.mapping_file.source_map import SourceMap, mapping_error
from xarch_kd.models.conversion.recipes import RECIPES
from xarch_kd.models.conversion.targets import TARGETS
from xarch_kd.models.in_place.teachers import WINDOW
from xarch_kd.planning.controls import applicable, control_problems, control_warnings
from xarch_kd.planning.cost import Rates, measured_rates
from xarch_kd.planning.custom import (
    CustomDivergence,
    CustomLayerMap,
    CustomObjective,
    CustomObjects,
    ProjectorFactory,
)
from xarch_kd.planning.heads import head_problems, projector_head_problems
from xarch_kd.planning.input_checks import (
    check_text_files,
    check_tokenizers,
    input_problems,
    input_warnings,
    selection_notices,
)
from xarch_kd.planning.layer_choice import LayerSelection
from xarch_kd.planning.layer_maps import entry_key, is_measured
from xarch_kd.planning.models import ModelPair
from xarch_kd.planning.plan import Plan, StagePlan
from xarch_kd.planning.problems import Diagnostics
from xarch_kd.planning.resolve_models import resolve_models
from xarch_kd.planning.shared_cache import cached_stages, shared_problems, with_shared_cache
from xarch_kd.planning.stage import stage_plan

check_table("mixers to convert to", {*RECIPES, WINDOW}, get_args(MixerName))
check_table("classes to convert to", {*TARGETS, "auto", "in_place"}, get_args(TargetName))


def make_plan(
    mapping: str | Path | Mapping[str, Any] | MappingFile,
    *,
    objectives: Mapping[str, CustomObjective] | None = None,
    divergences: Mapping[str, CustomDivergence] | None = None,
    layer_maps: Mapping[str, CustomLayerMap] | None = None,
    projectors: Mapping[str, ProjectorFactory] | None = None,
    control: Control | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Return the plan of a mapping file, checked against both models' configs; no weights are read.

    `mapping` is the path of a YAML file, a dict with the same keys (lists and tuples alike), or a `MappingFile`.
    `objectives`, `divergences`, `layer_maps` and `projectors` are objects by the names under which the mapping refers
    to them (`kind: custom, name: NAME`); `planning/custom.py` has their protocols. `control` replaces that of the
    mapping. `rates` are this machine's
    matrix-product rates, measured here by default.

    Raises `MappingFileError` with every problem of the mapping, `ModelError` for a model that cannot be read,
    `ConversionError` for a teacher that does not convert, `TapError` for an unknown model type; each names the place
    in the mapping. Raises `DataError` for text files that are not there.

    >>> import xarch_kd as xkd
    >>> from xarch_kd.testing.examples import write_example_files
    >>> write_example_files()  # teacher/, text.txt and mapping.yaml, all tiny
    >>> plan = xkd.plan("mapping.yaml")
    >>> plan.student.model_type, [pair.name for pair in plan.stages[0].pairs]
    ('granitemoehybrid', ['output.1'])
    """
    custom = CustomObjects.of(
        objectives=objectives, divergences=divergences, layer_maps=layer_maps, projectors=projectors
    )
    source_map, path = None, None
    if isinstance(mapping, str | PathLike):
        loaded, source, source_map = load_mapping(mapping)
        path = Path(mapping)
    else:
        loaded = mapping_from(mapping)
        source = mapping_as_yaml(loaded)
    if control is not None and control != loaded.control:
        loaded = loaded.model_copy(update={"control": control})
        source, source_map = mapping_as_yaml(loaded), None
    plan = _resolved(loaded, source, path, source_map, custom, rates)
    check_text_files(loaded)
    return plan


def plan_of_run(path: Path) -> Plan:
    """Return the plan of the mapping file of a run that is measured and not trained; custom objects are not needed."""
    loaded, source, source_map = load_mapping(path)
    return _resolved(loaded, source, path, source_map, CustomObjects.stand_ins(loaded), None, for_training=False)


def selected_plan(plan: Plan, selection: LayerSelection) -> Plan:
    """Return the plan whose conversion has the layers of `selection`; `plan.mapping` stays as it was written."""
    models = resolve_models(plan.mapping, plan.custom, None, selection)
    return _replanned(plan, (stage.stage for stage in plan.stages), models)


def calibrated_plan(plan: Plan, similarities: Mapping[str, Tensor]) -> Plan:
    """Return the plan with the layer maps that follow from `similarities`: [student, teacher layers] by `entry_key`.

    Only the stages are resolved again: models and rates are those of `plan`.
    """
    return _replanned(plan, (stage.stage for stage in plan.stages), replace(plan.models, similarities=similarities))


def with_steps(plan: Plan, *, rows: int) -> Plan:
    """Return the plan with a number of steps for each stage of epochs, from the number of training rows.

    An epoch is one pass over the rows, or over the stage's `batches` if it has that limit; the last step is a full one.
    `plan.mapping` stays as it was written. Raises MappingFileError for what shows only now, such as a cache that is too
    large.
    """
    if not any(stage.is_open for stage in plan.stages):
        return plan
    return _replanned(plan, (_in_steps(stage, rows) for stage in plan.stages), plan.models)


def _in_steps(plan: StagePlan, rows: int) -> Stage:
    stage = plan.stage
    if stage.epochs is None:
        return stage
    micro_batches = rows / plan.batch_size if stage.batches is None else min(stage.batches, rows / plan.batch_size)
    steps = max(1, math.ceil(round(stage.epochs * micro_batches / stage.gradient_accumulation, 9)))
    return stage.model_copy(update={"steps": steps, "epochs": None})


def _replanned(plan: Plan, stages: Iterable[Stage], models: ModelPair) -> Plan:
    """Return the plan with other stages or models; its mapping stays as it was written."""
    mapping = plan.mapping.model_copy(update={"stages": tuple(stages)})
    found = _plan(mapping, plan.source, plan.path, None, models, plan.rates)
    return replace(found, mapping=plan.mapping)


def _resolved(
    mapping: MappingFile,
    source: str,
    path: Path | None,
    source_map: SourceMap | None,
    custom: CustomObjects,
    rates: Rates | None,
    *,
    for_training: bool = True,
) -> Plan:
    if missing := [*custom.problems(mapping), *control_problems(mapping)]:
        raise mapping_error(missing, source_map)
    notes = control_warnings(mapping, planned := applicable(mapping))
    mapping = planned
    if rates is None:
        named = {mapping.teacher.dtype, *(stage.precision for stage in mapping.stages)}
        rates = measured_rates(_device(mapping), {"bfloat16" if dtype == "auto" else dtype for dtype in named})
    mapping = _with_dtypes(mapping, rates)
    models = resolve_models(mapping, custom, source_map)
    plan = _plan(mapping, source, path, source_map, models, rates, for_training=for_training)
    check_tokenizers(mapping, models, source_map)
    return replace(plan, warnings=(*notes, *plan.warnings))


def _with_dtypes(mapping: MappingFile, rates: Rates) -> MappingFile:
    """Return the mapping with `auto` replaced by the faster of bfloat16 and float32 on this machine.

    The result is part of a run's fingerprint, so that no run is resumed in another precision.
    """
    teacher, stages = mapping.teacher, mapping.stages
    if "auto" not in {teacher.dtype, *(stage.precision for stage in stages)}:
        return mapping
    faster = "bfloat16" if rates.per_second["bfloat16"] > rates.per_second["float32"] else "float32"
    if teacher.dtype == "auto":
        teacher = teacher.model_copy(update={"dtype": faster})
    stages = tuple(
        stage.model_copy(update={"precision": faster}) if stage.precision == "auto" else stage for stage in stages
    )
    return mapping.model_copy(update={"teacher": teacher, "stages": stages})


def _plan(
    mapping: MappingFile,
    source: str,
    path: Path | None,
    source_map: SourceMap | None,
    models: ModelPair,
    rates: Rates,
    *,
    for_training: bool = True,
) -> Plan:
    diagnostics = Diagnostics(
        problems=[*input_problems(mapping, models, for_training=for_training), *head_problems(mapping, models)],
        warnings=[*models.custom.warnings(mapping), *models.warnings],
        for_training=for_training,
    )
    diagnostics.problems += shared_problems(mapping)
    stages: list[StagePlan] = []
    shared = 0 if cached_stages(mapping) else None
    for index, stage in enumerate(mapping.stages):
        found = stage_plan(index, stage, mapping.data, models, rates, diagnostics, shared=shared)
        if found is not None:
            stages.append(found)
            diagnostics.problems += projector_head_problems(found, models)
            if shared is not None and stage.cache_place != "off":
                shared = max(shared, found.distinct_batches)
    stages = with_shared_cache(mapping, stages, models.teacher, diagnostics)
    if diagnostics.problems:
        raise mapping_error(diagnostics.problems, source_map)
    similarities = models.similarities
    return Plan(
        mapping=mapping,
        source=source,
        path=path,
        teacher=models.teacher.summary(),
        student=models.student.summary(() if mapping.control == "unchanged" else models.replaced),
        student_config=models.student.config.to_dict(),
        stages=tuple(stages),
        warnings=tuple(dict.fromkeys([*_model_warnings(mapping, models), *diagnostics.warnings])),
        models=models,
        rates=rates,
        similarities=_named_similarities(mapping, similarities),
        uncalibrated=tuple(entry for entry in _measured(mapping) if entry_key(*entry) not in similarities),
    )


def _measured(mapping: MappingFile) -> Iterator[tuple[int, str]]:
    """Yield the entries whose layer map follows from a calibration pass, as (stage index, name)."""
    for index, stage in enumerate(mapping.stages):
        yield from ((index, align.name) for align in stage.align if is_measured(align))


def _named_similarities(
    mapping: MappingFile, similarities: Mapping[str, Tensor]
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Return the similarities by `stage.entry`."""
    return {
        f"{mapping.stages[index].name}.{name}": tuple(map(tuple, similarities[entry_key(index, name)].tolist()))
        for index, name in _measured(mapping)
        if entry_key(index, name) in similarities
    }


def _model_warnings(mapping: MappingFile, models: ModelPair) -> Iterator[str]:
    yield from input_warnings(mapping, models)
    yield from selection_notices(mapping, models)
    rows = (models.student.vocabulary, models.teacher.vocabulary)
    if rows[0] != rows[1] and any(stage.tokens is not None for stage in mapping.stages):
        yield (
            f"the student's vocabulary has {rows[0]} rows and the teacher's {rows[1]}: next-token distributions are "
            f"compared over the first {min(rows)}, if both tokenizers agree on them"
        )
    embedding = models.student.layout.model.get_input_embeddings().weight
    if mapping.student.embeddings == "teacher":
        yield _transfer_note(models, is_fitted=mapping.student.head == "closed_form")
    for stage in mapping.stages:
        if stage.epochs is not None:
            yield (
                f"stage {stage.name}: its number of steps (epochs: {stage.epochs:g}) depends on the text, which train "
                "reads: its tokens, cache and time in the plan are those of one step"
            )
        part = {"embeddings", "head"} & set(stage.parts)
        if len(part) == 1 and "all" not in stage.parts and embedding is models.student.layout.head_weight:
            yield f"stage {stage.name}: the student's head is its embedding, so training {part.pop()} trains both"


def _transfer_note(models: ModelPair, *, is_fitted: bool) -> str:
    """Return what `embeddings: teacher` does to these dimensions; with `is_fitted` the head is not taken over."""
    student, teacher = (model.layout.model.get_input_embeddings().weight for model in (models.student, models.teacher))
    assert isinstance(student, Tensor)
    assert isinstance(teacher, Tensor)
    own, other = student.shape[1], teacher.shape[1]
    change = f"projected from {other} dimensions onto {own}" if own < other else "copied"
    change += f", zero in dimensions {other} to {own - 1}" if own > other else ""
    has_own = student is models.student.layout.head_weight or is_fitted
    return f"the student's embeddings{'' if has_own else ' and head'} start as the teacher's, {change}"


def _device(mapping: MappingFile) -> str:
    if mapping.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    # A device that is not there is a problem of its own.
    return mapping.device if torch.cuda.is_available() else "cpu"
