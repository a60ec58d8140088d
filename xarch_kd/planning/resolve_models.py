"""Resolution of a mapping's two models: configs, models without storage, and the blocks that a conversion replaces."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from xarch_kd.errors import UsageError
from xarch_kd.mapping_file.layer_choice import CacheBudget, LayerStrategy
from xarch_kd.mapping_file.schema import ConversionOptions, MappingFile, Paths
from xarch_kd.mapping_file.source_map import Problem, SourceMap, YamlPath, mapping_error
from xarch_kd.models.cache_size import cache_layers
from xarch_kd.models.conversion.convert import plan_conversion
from xarch_kd.models.fresh import FreshConfigError, fresh_config
from xarch_kd.models.loading.load import DTYPES, check_files, load_config, meta_model, read_student_config
from xarch_kd.models.mamba_ssm.config import mamba_ssm_config
from xarch_kd.planning.custom import CustomObjects
from xarch_kd.planning.layer_choice import LayerSelection, unmeasured_kept, with_count
from xarch_kd.planning.models import ModelHandle, ModelPair, replaced_layers
from xarch_kd.planning.problems import located, one_line
from xarch_kd.taps.layout import layout_of


def resolve_models(
    mapping: MappingFile, custom: CustomObjects, source_map: SourceMap | None, selection: LayerSelection | None = None
) -> ModelPair:
    """Return both models of a mapping: each config is loaded once and each model built once, without storage.

    `selection` has the layers of a conversion that chooses them by measurement; until they are measured others stand
    in their place.

    Raises `MappingFileError`, `ModelError`, `ConversionError` and `TapError`, each with the place in the mapping.
    """
    with located(("teacher", "model"), source_map):
        config = load_config(mapping.teacher.model, mapping.teacher.revision)
    teacher = _handle(
        mapping.teacher.model, config, mapping.teacher.paths, mapping.teacher.dtype, ("teacher",), source_map
    )
    strategy = _strategy(mapping, teacher, source_map)
    conversion = _with_layers(mapping, strategy, teacher.depth, selection, source_map)
    source = _student_source(mapping, conversion, config, source_map)
    if mapping.student.format == "mamba_ssm":
        with located(("student", "format"), source_map):
            mamba_ssm_config(source.config)
    student = _handle(
        source.reference, source.config, mapping.student.paths, mapping.student.dtype, ("student",), source_map
    )
    for model, place in ((teacher, "teacher"), (student, "student")):
        if place == "teacher" or mapping.student.model is not None:
            with located((place, "model"), source_map):
                check_files(model.layout.model, model.reference)
    return ModelPair(
        teacher,
        student,
        replaced_layers(teacher, student) if source.replaced is None else source.replaced,
        frozen=frozenset(source.frozen),
        inherits=mapping.student.convert is not None,
        fresh=mapping.student.config is not None,
        calibration=mapping.calibration.tokens,
        custom=custom,
        warnings=source.warnings,
        conversion=conversion,
        strategy=strategy,
        selection=selection,
    )


def _strategy(mapping: MappingFile, teacher: ModelHandle, source_map: SourceMap | None) -> LayerStrategy | None:
    """Return the strategy that chooses layers, with a number of layers in place of bytes of cache."""
    conversion = mapping.student.convert
    if conversion is None or not isinstance(conversion.selection, LayerStrategy):
        return None
    strategy, key = conversion.selection, conversion.selection_key
    if not isinstance(strategy.budget, CacheBudget):
        return strategy
    with located(("student", "convert"), source_map):
        planned = plan_conversion(teacher.config, mixer=conversion.mixer, target=conversion.target, keep_attention=[0])
    layers = cache_layers(layout_of(meta_model(planned.config)))
    tokens, dtype = strategy.budget.at_context, DTYPES[mapping.student.dtype]
    sizes = [layer.size(tokens, dtype) for layer in layers[: teacher.depth]]
    try:
        return with_count(strategy, key, teacher.depth, sizes[0], max(sizes[1:]))
    except UsageError as error:
        place = ("student", "convert", key, "budget")
        raise mapping_error([Problem(place, one_line(error))], source_map) from None


def _with_layers(
    mapping: MappingFile,
    strategy: LayerStrategy | None,
    layers: int,
    selection: LayerSelection | None,
    source_map: SourceMap | None,
) -> ConversionOptions | None:
    """Return the conversion with a list of layers in place of a strategy."""
    conversion = mapping.student.convert
    if conversion is None or strategy is None:
        return conversion
    key = conversion.selection_key
    try:
        kept = unmeasured_kept(strategy, key, layers, seed=mapping.seed)
    except UsageError as error:
        raise mapping_error([Problem(("student", "convert", key), one_line(error))], source_map) from None
    if selection is not None:
        kept = selection.kept
    chosen = kept if key == "keep_attention" else tuple(index for index in range(layers) if index not in kept)
    return conversion.model_copy(update={key: chosen})


@dataclass(frozen=True, kw_only=True)
class _StudentSource:
    """Config of a student, and the frozen parameters and warnings of its conversion.

    `replaced` are the blocks that train as mixers of a teacher that is not converted, None elsewhere.
    """

    reference: str
    config: PreTrainedConfig
    frozen: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    replaced: tuple[int, ...] | None = None


def _student_source(
    mapping: MappingFile,
    conversion: ConversionOptions | None,
    teacher: PreTrainedConfig,
    source_map: SourceMap | None,
) -> _StudentSource:
    student = mapping.student
    if conversion is not None:
        converted = _converted(mapping.teacher.model, conversion, teacher, source_map)
        if mapping.control == "unchanged":
            reference = f"{mapping.teacher.model}, unchanged"
            return _StudentSource(reference=reference, config=copy.deepcopy(teacher), replaced=converted.replaced)
        return replace(converted, replaced=None)
    if isinstance(student.config, dict):
        try:
            config = fresh_config(student.config, teacher)
        except FreshConfigError as error:
            raise mapping_error(_config_problems(error), source_map) from None
        return _StudentSource(reference=f"fresh {student.config.get('model_type')}", config=config)
    if student.config is not None:
        with located(("student", "config"), source_map):
            return _StudentSource(reference=student.config, config=read_student_config(student.config))
    assert student.model is not None
    with located(("student", "model"), source_map):
        return _StudentSource(reference=student.model, config=load_config(student.model, student.revision))


def _converted(
    reference: str, conversion: ConversionOptions, teacher: PreTrainedConfig, source_map: SourceMap | None
) -> _StudentSource:
    try:
        with located(("student", "convert"), source_map):
            planned = plan_conversion(
                teacher,
                mixer=conversion.mixer,
                target=conversion.target,
                mamba2=conversion.mixer_sizes,
                **conversion.layers,
                window=conversion.window,
                sinks=conversion.sinks,
            )
    except UsageError as error:
        place = ("student", "convert", conversion.selection_key)
        raise mapping_error([Problem(place, one_line(error))], source_map) from None
    return _StudentSource(
        reference=f"converted from {reference}",
        config=planned.config,
        frozen=planned.frozen,
        warnings=planned.warnings,
        replaced=tuple(layer for layer in range(_depth(teacher)) if layer not in planned.kept),
    )


def _depth(config: PreTrainedConfig) -> int:
    return int(config.get_text_config().num_hidden_layers)


def _config_problems(error: FreshConfigError) -> list[Problem]:
    yaml_path = ("student", "config")
    return [
        Problem(yaml_path if problem.key is None else (*yaml_path, problem.key), problem.message)
        for problem in error.problems
    ]


def _handle(
    reference: str,
    config: PreTrainedConfig,
    paths: Paths | None,
    dtype: str,
    yaml_path: YamlPath,
    source_map: SourceMap | None,
) -> ModelHandle:
    try:
        with located(yaml_path, source_map):
            return ModelHandle.of(reference, config, paths, dtype)
    except UsageError as error:
        raise mapping_error([Problem((*yaml_path, "paths"), one_line(error))], source_map) from None
