"""Checks of what a run needs beside its mapping and configs: tokenizers, positions, device, packages, files.

No weight and no whole text is read.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from typing import Final

import torch
from torch import nn

from xarch_kd.data.paths import find_files
from xarch_kd.mapping_file.layer_choice import LayerStrategy
from xarch_kd.mapping_file.schema import MappingFile, Text
from xarch_kd.mapping_file.source_map import Problem, SourceMap
from xarch_kd.models.loading.load import load_tokenizer
from xarch_kd.models.loading.quantized import stored_method, unsupported_reason
from xarch_kd.models.loading.tokenizer_file import has_tokenizer, stored_tokens
from xarch_kd.models.loading.tokens import check_same_ids, shared_vocabulary, too_many_tokens
from xarch_kd.planning.context_lengths import speed_problems
from xarch_kd.planning.models import ModelHandle, ModelPair
from xarch_kd.planning.problems import located

# Of SmolLM2-135M with untrained Mamba-2 mixers: KL of blocks 0 and 1 against those of the 28 others.
FEWEST_LAYERS: Final = 8
FIRST_BLOCKS: Final = "in SmolLM2-135M by a KL of 1.2 and 1.1 nats per token against 0.02 to 0.2 of any other"

_POSITIONS: Final = re.compile(r"(^|[._])(wpe|\w*pos(ition)?s?(_|$)\w*)")


def input_problems(mapping: MappingFile, models: ModelPair, *, for_training: bool = True) -> Iterator[Problem]:
    """Yield the problems of a mapping's inputs that are found without reading weights.

    Where a finished run is measured, not trained, the packages of its `tracking` are not needed.
    """
    yield from _device_problems(mapping)
    if for_training:
        yield from _tracking_problems(mapping)
    yield from _package_problems(mapping)
    yield from _quantization_problems(mapping, models)
    yield from _position_problems(mapping, models)
    yield from _speed_problems(mapping, models)


def input_warnings(mapping: MappingFile, models: ModelPair) -> Iterator[str]:
    """Yield a warning for each model that runs beyond the positions that it was trained with."""
    length = mapping.data.sequence_length
    for model, name in ((models.teacher, "teacher"), (models.student, "student")):
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(longest, int) and length > longest:
            yield f"data.sequence_length is {length}, but the {name} was made for at most {longest} positions"


def selection_notices(mapping: MappingFile, models: ModelPair) -> Iterator[str]:
    """Yield what is to know of the choice of layers: that it is still to be made, or replaces the first ones."""
    conversion = mapping.student.convert
    if conversion is None:
        return
    strategy = conversion.selection
    layers, replaced = models.teacher.depth, len(models.replaced)
    if isinstance(strategy, LayerStrategy):
        if strategy.is_measured and models.selection is None:
            yield (
                f"{replaced} of {layers} layers are replaced, which are chosen by measurement at the start of training "
                f"(strategy: {strategy.strategy}): evenly spaced ones stand in their place here; "
                "`xarch-kd plan --calibrate` chooses them now"
            )
    elif (
        isinstance(strategy, str)
        and FEWEST_LAYERS <= layers > replaced
        and (first := sorted({0, 1} & set(models.replaced)))
    ):
        yield (
            f"{conversion.selection_key} replaces block {' and '.join(map(str, first))}: the first blocks suffer most "
            f"from a new mixer, {FIRST_BLOCKS}. Layers are chosen by measurement with "
            f"replace: {{strategy: sensitivity, budget: {replaced}}}"
        )


def _device_problems(mapping: MappingFile) -> Iterator[Problem]:
    if mapping.device == "cuda" and not torch.cuda.is_available():
        build = "which is built without CUDA" if torch.version.cuda is None else "no device is found"
        message = f"cuda cannot be used by this torch ({torch.__version__}): {build}. Use device: auto or device: cpu."
        yield Problem(("device",), message)


def _tracking_problems(mapping: MappingFile) -> Iterator[Problem]:
    for index, package in enumerate(mapping.tracking):
        if importlib.util.find_spec(package) is None:
            yield Problem(("tracking", index), f"needs the package '{package}': pip install {package}")


def _package_problems(mapping: MappingFile) -> Iterator[Problem]:
    for side, reference in (("teacher", mapping.teacher.model), ("student", mapping.student.model)):
        if reference is not None and reference.lower().endswith(".gguf") and importlib.util.find_spec("gguf") is None:
            yield Problem((side, "model"), "reading a GGUF file needs the package 'gguf': pip install 'xarch_kd[gguf]'")


def _quantization_problems(mapping: MappingFile, models: ModelPair) -> Iterator[Problem]:
    teacher, asked = models.teacher.config, mapping.teacher.quantization
    place = ("teacher", "model" if asked is None else "quantization")
    if mapping.student.convert is not None and (asked is not None or stored_method(teacher) is not None):
        found = f"quantization: {asked}" if asked is not None else f"a checkpoint quantized by {stored_method(teacher)}"
        yield Problem(place, f"conversion takes a teacher in full precision, found {found}")
    elif (reason := unsupported_reason(teacher, asked)) is not None:
        yield Problem(place, reason)
    if mapping.student.model is not None and (method := stored_method(models.student.config)) is not None:
        yield Problem(("student", "model"), f"a student trains in full precision, found one quantized by {method}")


def _position_problems(mapping: MappingFile, models: ModelPair) -> Iterator[Problem]:
    length = mapping.data.sequence_length
    for model, name in ((models.teacher, "teacher"), (models.student, "student")):
        longest = table_of_positions(model)
        if longest is not None and length > longest:
            message = (
                f"{length} is longer than the {longest} positions that the {name} ({model.config.model_type}) has "
                f"embeddings for, and it computes nothing beyond them. Use at most {longest}."
            )
            yield Problem(("data", "sequence_length"), message)
            return


def _speed_problems(mapping: MappingFile, models: ModelPair) -> Iterator[Problem]:
    evaluate = mapping.evaluate
    if evaluate is not None and "speed" in evaluate.suites:
        for key, message in speed_problems(evaluate.speed, models.teacher.layout, models.student.layout):
            yield Problem(("evaluate", "speed", key), message)


def table_of_positions(model: ModelHandle) -> int | None:
    """Return the number of positions in a model's table of learned or stored positions, None without such a table."""
    whole = model.layout.model
    sizes = [
        # Positions of RoBERTa and its kin begin after the padding's.
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in whole.named_modules()
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name) and module is not model.layout.embedding
    ]
    sizes += [
        buffer.shape[0]
        for name, buffer in whole.named_buffers()
        if buffer.ndim == 2 and buffer.shape[0] > 1 and _POSITIONS.search(name.rpartition(".")[2])
    ]
    if not sizes:
        return None
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Some tables have a few rows more than positions, e.g. OPT's begins with two that stand for padding.
    return min([*sizes, stated]) if isinstance(stated, int) and stated > 0 else min(sizes)


def check_text_files(mapping: MappingFile) -> None:
    """Raise `DataError` for text files that are not there, those of the evaluation after training included."""
    data, evaluate = mapping.data, mapping.evaluate
    texts: list[Text] = [*(data.mixture or (data,)), *(() if evaluate is None else evaluate.also)]
    texts += [] if data.evaluation is None else [data.evaluation]
    for text in texts:
        if text.files is not None:
            find_files(text.files)


def check_tokenizers(mapping: MappingFile, models: ModelPair, source_map: SourceMap | None) -> None:
    """Raise `ModelError`, with the place in the mapping, for a tokenizer that does not fit the models.

    A student that exists has its own, which is compared with the teacher's.
    """
    teacher, student = mapping.teacher, mapping.student
    reference = teacher.tokenizer or teacher.model
    with located(("teacher", "tokenizer" if teacher.tokenizer else "model"), source_map):
        tokens = stored_tokens(reference, teacher.revision)
        for model, side in ((models.teacher, "teacher"), (models.student, "student")):
            if tokens is not None and tokens > model.vocabulary and (side == "teacher" or student.config is not None):
                raise too_many_tokens(tokens, model.vocabulary, side=side)
    if student.model is None:
        return
    own = student.tokenizer or student.model
    if not has_tokenizer(reference, teacher.revision) or not has_tokenizer(own, student.revision):
        return
    with located(("student", "tokenizer" if student.tokenizer else "model"), source_map):
        teachers, students = load_tokenizer(reference, teacher.revision), load_tokenizer(own, student.revision)
        check_same_ids(teachers, students, models.student.vocabulary)
        if any(stage.tokens is not None for stage in mapping.stages):
            shared_vocabulary(teachers, students, models.teacher.vocabulary, models.student.vocabulary)
