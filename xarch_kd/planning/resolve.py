"""Resolution of a mapping file to a plan from both configs, without weights; all problems are reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from xarch_kd.errors import ModelError, UsageError, check_table
from xarch_kd.mapping_file import schema
from xarch_kd.mapping_file.load import load_mapping
from xarch_kd.mapping_file.python_values import mapping_as_yaml, mapping_from
from xarch_kd.mapping_file.schema import MappingFile, MixerName, Paths, TargetName
from xarch_kd.mapping_file.source_map import Problem, SourceMap, YamlPath, mapping_error, yaml_path_text
from xarch_kd.models.conversion.base import Conversion
from xarch_kd.models.conversion.convert import plan_conversion
from xarch_kd.models.conversion.recipes import RECIPES
from xarch_kd.models.conversion.targets import TARGETS
from xarch_kd.models.fresh import FreshConfigError, fresh_config
from xarch_kd.models.loading.load import load_config, read_student_config
from xarch_kd.models.mamba_ssm.config import mamba_ssm_config
from xarch_kd.planning.cost import Rates, measured_rates
from xarch_kd.planning.custom import (
    CustomDivergence,
    CustomLayerMap,
    CustomObjective,
    CustomObjects,
    ProjectorFactory,
)
from xarch_kd.planning.layer_maps import entry_key, is_measured
from xarch_kd.planning.models import ModelHandle, ModelPair, replaced_layers
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.problems import Diagnostics, one_line
from xarch_kd.planning.stage import stage_plan

check_table("mixers to convert to", RECIPES, get_args(MixerName))
check_table("classes to convert to", {*TARGETS, "auto", "in_place"}, get_args(TargetName))


def make_plan(
    mapping: str | Path | Mapping[str, Any] | MappingFile,
    *,
    objectives: Mapping[str, CustomObjective] | None = None,
    divergences: Mapping[str, CustomDivergence] | None = None,
    layer_maps: Mapping[str, CustomLayerMap] | None = None,
    projectors: Mapping[str, ProjectorFactory] | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Return the plan of a mapping file, checked against both models' configs; no weights are read.

    `mapping` is the path of a YAML file, a dict with the same keys (lists and tuples alike), or a `MappingFile`.
    `objectives`, `divergences`, `layer_maps` and `projectors` are objects by the names under which the mapping refers
    to them (`kind: custom, name: NAME`); `planning/custom.py` has their protocols. `rates` are this machine's
    matrix-product rates, measured here by default.

    Raises `MappingFileError` with every problem of the mapping, `ModelError` for a model that cannot be read,
    `ConversionError` for a teacher that does not convert, `TapError` for an unknown model type; each names the place
    in the mapping.
    """
    custom = CustomObjects.of(
        objectives=objectives, divergences=divergences, layer_maps=layer_maps, projectors=projectors
    )
    if isinstance(mapping, str | PathLike):
        loaded, source, source_map = load_mapping(mapping)
        return _plan(loaded, source, Path(mapping), source_map, custom, rates)
    loaded = mapping_from(mapping)
    return _plan(loaded, mapping_as_yaml(loaded), None, None, custom, rates)


def plan_of_run(path: Path) -> Plan:
    """Return the plan of the mapping file of a run that is measured and not trained; custom objects are not needed."""
    loaded, source, source_map = load_mapping(path)
    return _plan(loaded, source, path, source_map, CustomObjects.stand_ins(loaded), None)


def calibrated_plan(plan: Plan, similarities: Mapping[str, Tensor], *, rates: Rates | None = None) -> Plan:
    """Return the plan with the layer maps that follow from `similarities`: [student, teacher layers] by `entry_key`."""
    return _plan(plan.mapping, plan.source, plan.path, None, plan.custom, rates, similarities)


def _plan(
    mapping: MappingFile,
    source: str,
    path: Path | None,
    source_map: SourceMap | None,
    custom: CustomObjects,
    rates: Rates | None,
    similarities: Mapping[str, Tensor] = MappingProxyType({}),
) -> Plan:
    diagnostics = Diagnostics(warnings=custom.warnings(mapping))
    if missing := custom.problems(mapping):
        raise mapping_error(missing, source_map)
    with _placed(("teacher", "model"), source_map):
        teacher_config = load_config(mapping.teacher.model, mapping.teacher.revision)
    teacher = _side(
        mapping.teacher.model, teacher_config, mapping.teacher.paths, mapping.teacher.dtype, ("teacher",), source_map
    )
    conversion = _conversion(mapping.student.convert, teacher_config, source_map)
    diagnostics.warnings += () if conversion is None else conversion.warnings
    student = _student(mapping, teacher_config, conversion, source_map)
    models = ModelPair(
        teacher,
        student,
        replaced_layers(teacher, student),
        similarities,
        frozenset(() if conversion is None else conversion.frozen),
        inherits=conversion is not None,
        fresh=mapping.student.config is not None,
        calibration=mapping.calibration.tokens,
        custom=custom,
    )
    rates = rates or measured_rates(_device(mapping))
    stages = [
        stage_plan(index, stage, mapping.data, models, rates, diagnostics) for index, stage in enumerate(mapping.stages)
    ]
    if diagnostics.problems:
        raise mapping_error(diagnostics.problems, source_map)
    return Plan(
        mapping=mapping,
        source=source,
        path=path,
        teacher=teacher.summary(),
        student=student.summary(models.replaced),
        student_config=student.config.to_dict(),
        stages=tuple(stage for stage in stages if stage is not None),
        warnings=tuple(dict.fromkeys([*_model_warnings(mapping, models), *diagnostics.warnings])),
        timing_assumptions=rates.timing_assumptions,
        custom=custom,
        similarities=_shown(mapping, similarities),
        uncalibrated=tuple(entry for entry in _measured(mapping) if entry_key(*entry) not in similarities),
    )


def _measured(mapping: MappingFile) -> Iterator[tuple[int, str]]:
    """Yield the entries whose layer map follows from a calibration pass, as (stage index, name)."""
    for index, stage in enumerate(mapping.stages):
        yield from ((index, align.name) for align in stage.align if is_measured(align))


def _shown(mapping: MappingFile, similarities: Mapping[str, Tensor]) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Return the similarities by the names used in the plan."""
    return {
        f"{mapping.stages[index].name}.{name}": tuple(map(tuple, similarities[entry_key(index, name)].tolist()))
        for index, name in _measured(mapping)
        if entry_key(index, name) in similarities
    }


def _student(
    mapping: MappingFile, teacher: PreTrainedConfig, conversion: Conversion | None, source_map: SourceMap | None
) -> ModelHandle:
    student = mapping.student
    if conversion is not None:
        config, reference = conversion.config, f"converted from {mapping.teacher.model}"
    elif isinstance(student.config, dict):
        reference = f"fresh {student.config.get('model_type')}"
        try:
            config = fresh_config(student.config, teacher)
        except FreshConfigError as error:
            raise mapping_error(_config_problems(error), source_map) from None
    elif student.config is not None:
        reference = student.config
        with _placed(("student", "config"), source_map):
            config = read_student_config(reference)
    else:
        reference = student.model or ""
        with _placed(("student", "model"), source_map):
            config = load_config(reference, student.revision)
    if student.format == "mamba_ssm":
        with _placed(("student", "format"), source_map):
            mamba_ssm_config(config)
    return _side(reference, config, student.paths, student.dtype, ("student",), source_map)


def _config_problems(error: FreshConfigError) -> list[Problem]:
    place = ("student", "config")
    return [
        Problem(place if problem.key is None else (*place, problem.key), problem.message) for problem in error.problems
    ]


def _conversion(
    asked: schema.Conversion | None, teacher: PreTrainedConfig, source_map: SourceMap | None
) -> Conversion | None:
    """Return the conversion of the teacher in the file, or None."""
    if asked is None:
        return None
    try:
        with _placed(("student", "convert"), source_map):
            return plan_conversion(
                teacher,
                mixer=asked.mixer,
                keep_attention=asked.keep_attention,
                replace=asked.replace,
                target=asked.target,
            )
    except UsageError as error:
        key = "keep_attention" if asked.keep_attention is not None else "replace"
        raise mapping_error([Problem(("student", "convert", key), one_line(error))], source_map) from None


def _side(
    reference: str,
    config: PreTrainedConfig,
    paths: Paths | None,
    dtype: str,
    place: YamlPath,
    source_map: SourceMap | None,
) -> ModelHandle:
    try:
        with _placed(place, source_map):
            return ModelHandle.of(reference, config, paths, dtype)
    except UsageError as error:
        raise mapping_error([Problem((*place, "paths"), one_line(error))], source_map) from None


@contextmanager
def _placed(place: YamlPath, source_map: SourceMap | None) -> Iterator[None]:
    """Prefix problems of a model with the place in the file that names the model."""
    try:
        yield
    except ModelError as error:
        where = yaml_path_text(place)
        if source_map is not None:
            position = source_map.position(place)
            where = f"{source_map.name}:{position.line}:{position.column}: {where}"
        raise type(error)(
            f"{where}: {error.message}", asked=error.asked, found=error.found, allowed=error.allowed, fix=error.fix
        ) from error


def _model_warnings(mapping: MappingFile, models: ModelPair) -> Iterator[str]:
    length = mapping.data.sequence_length
    for side, name in ((models.teacher, "teacher"), (models.student, "student")):
        longest = getattr(side.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(longest, int) and length > longest:
            yield f"data.sequence_length is {length}, but the {name} was made for at most {longest} positions"
    rows = (models.student.vocabulary, models.teacher.vocabulary)
    if rows[0] != rows[1] and any(stage.tokens is not None for stage in mapping.stages):
        yield (
            f"the student's vocabulary has {rows[0]} rows and the teacher's {rows[1]}: next-token distributions are "
            f"compared over the first {min(rows)}, if both tokenizers agree on them"
        )
    embedding = models.student.layout.model.get_input_embeddings().weight
    if mapping.student.embeddings == "teacher":
        yield _transfer_note(models)
    for stage in mapping.stages:
        part = {"embeddings", "head"} & set(stage.train)
        if len(part) == 1 and "all" not in stage.train and embedding is models.student.layout.head_weight:
            yield f"stage {stage.name}: the student's head is its embedding, so training {part.pop()} trains both"


def _transfer_note(models: ModelPair) -> str:
    """Return what `embeddings: teacher` does to these dimensions."""
    student, teacher = (side.layout.model.get_input_embeddings().weight for side in (models.student, models.teacher))
    assert isinstance(student, Tensor)
    assert isinstance(teacher, Tensor)
    own, other = student.shape[1], teacher.shape[1]
    what = f"projected from {other} dimensions onto {own}" if own < other else "copied"
    what += f", zero in dimensions {other} to {own - 1}" if own > other else ""
    is_tied = student is models.student.layout.head_weight
    return f"the student's embeddings{'' if is_tied else ' and head'} start as the teacher's, {what}"


def _device(mapping: MappingFile) -> str:
    if mapping.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if mapping.device == "cuda" and not torch.cuda.is_available():
        return "cpu"
    return mapping.device
