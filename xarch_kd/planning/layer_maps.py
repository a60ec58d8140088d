"""The layer map of one `align` entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from xarch_kd.errors import UsageError, check_table
from xarch_kd.layer_mapping import STRATEGIES, LayerMap, build_layer_map, explicit
from xarch_kd.layer_mapping.strategies import Needs
from xarch_kd.mapping_file.layer_maps import STRATEGY_OPTIONS, CustomStrategy, LayerPair, RandomStrategy
from xarch_kd.mapping_file.objectives import Align
from xarch_kd.mapping_file.scalars import kinds_of
from xarch_kd.mapping_file.source_map import Problem, YamlPath
from xarch_kd.planning.models import ModelPair
from xarch_kd.planning.problems import Diagnostics, one_line
from xarch_kd.projectors import enough_tokens
from xarch_kd.taps.sites import MIXING_TAPS

check_table("layer map strategies", {*STRATEGIES, "custom"}, kinds_of(STRATEGY_OPTIONS))


def layer_map(align: Align, models: ModelPair, place: YamlPath, diagnostics: Diagnostics) -> LayerMap | None:
    """Return the layer map of an `align` entry, or None if there is none, with the reason in `diagnostics`.

    Of a strategy that follows from data this is `uniform` until the similarity of the layers is known.
    """
    depths = (models.student.depth, models.teacher.depth)
    if align.layers is None:
        message = (
            "required key is missing. It must be a strategy (same, uniform, cka, …) or a list of {student, teacher}."
        )
        diagnostics.problems.append(Problem((*place, "layers"), message))
        return None
    if isinstance(align.layers, tuple):
        return _explicit(align.layers, depths, place, diagnostics)
    if isinstance(align.layers, CustomStrategy):
        return _custom(align.layers.name, models, place, diagnostics)
    name, options = strategy_of(align)
    options.pop("redraw", None)
    similarity = models.similarities.get(entry_key(int(place[1]), align.name))
    if is_measured(align) and align.tap in MIXING_TAPS:
        message = f"{name} compares features, and {align.tap} is none. Use a strategy that needs no calibration."
        diagnostics.problems.append(Problem((*place, "layers"), message))
        return None
    if is_measured(align):
        diagnostics.warnings += _too_few_tokens(align.name, name, models)
    try:
        if not is_measured(align) or similarity is not None:
            return _built(name, options, models, similarity)
        # Whether it can place these depths at all is known before anything is measured.
        _built(name, options, models, torch.zeros(depths))
    except UsageError as error:
        diagnostics.problems.append(Problem((*place, "layers"), one_line(error)))
        return None
    diagnostics.warnings.append(
        f"{align.name}: which layers {name} pairs follows from a calibration pass; uniform stands in for it here"
    )
    return _built("uniform", {}, models, None)


def _custom(name: str, models: ModelPair, place: YamlPath, diagnostics: Diagnostics) -> LayerMap | None:
    """Return the layer map of a custom strategy, or None if the diagnostics have the reason why there is none."""
    depths = (models.student.depth, models.teacher.depth)
    made = models.custom.layer_maps[name](*depths)
    weights = made.weights if isinstance(made, LayerMap) else made
    message = None
    if not isinstance(weights, Tensor) or tuple(weights.shape) != depths:
        found = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        message = f"the layer map '{name}' returned {found}; allowed: weights {list(depths)} [student, teacher layers]"
    else:
        try:
            custom_map = LayerMap(f"custom {name}", weights)
            if custom_map.pairs():
                return custom_map
            message = f"the layer map '{name}' is 0 everywhere, so nothing would be matched"
        except UsageError as error:
            message = one_line(error)
    diagnostics.problems.append(Problem((*place, "layers"), message))
    return None


def _too_few_tokens(entry: str, name: str, models: ModelPair) -> Iterator[str]:
    dim = max(models.student.layout.dim, models.teacher.layout.dim)
    if models.calibration < dim:
        yield (
            f"{entry}: {name} compares layers in up to {dim} dimensions on {models.calibration} tokens, so that "
            f"noise may decide; calibration.tokens of {enough_tokens(dim)} or more is better"
        )


def _built(name: str, options: Mapping[str, object], models: ModelPair, similarity: Tensor | None) -> LayerMap:
    return build_layer_map(
        name,
        models.student.depth,
        models.teacher.depth,
        replaced_layers=models.replaced,
        student_kinds=models.student.layout.mixer_kinds,
        teacher_kinds=models.teacher.layout.mixer_kinds,
        similarity=similarity,
        options=options,
    )


def strategy_of(align: Align) -> tuple[str, dict[str, object]]:
    """Return the name of an entry's strategy and its options, however it was written."""
    if isinstance(align.layers, str):
        return align.layers, {}
    assert align.layers is not None
    assert not isinstance(align.layers, tuple)
    return align.layers.strategy, align.layers.model_dump(exclude={"strategy"}, exclude_none=True)


def redraw_period(align: Align) -> int | None:
    """Return the number of steps between redraws of a random layer map, None for never."""
    return align.layers.redraw if isinstance(align.layers, RandomStrategy) else None


def is_learned(align: Align) -> bool:
    """Return True if the layer map of an entry is trained with the student."""
    return _needs(align) == "training"


def is_measured(align: Align) -> bool:
    """Return True if the layer map of an entry needs a calibration pass."""
    return _needs(align) == "similarity"


def _needs(align: Align) -> Needs | None:
    """Return the input of an entry's strategy; None for explicit pairs, custom maps and taps without layers."""
    if align.layers is None or isinstance(align.layers, tuple | CustomStrategy):
        return None
    return STRATEGIES[strategy_of(align)[0]].needs


def entry_key(stage: int, name: str) -> str:
    """Return the key of the similarity of an entry's layers: the stage's index and the entry's name."""
    return f"{stage}.{name}"


def _explicit(
    pairs: tuple[LayerPair, ...], depths: tuple[int, int], place: YamlPath, diagnostics: Diagnostics
) -> LayerMap | None:
    outside = [
        Problem(
            (*place, "layers", index, name),
            f"layer {layer} is out of range: the {name} has {depth} blocks, so 0 to {depth - 1} are allowed",
        )
        for index, pair in enumerate(pairs)
        for name, layer, depth in (("student", pair.student, depths[0]), ("teacher", pair.teacher, depths[1]))
        if layer >= depth
    ]
    diagnostics.problems += outside
    if not pairs:
        diagnostics.problems.append(Problem((*place, "layers"), "the list is empty, so nothing would be matched"))
    if outside or not pairs:
        return None
    try:
        return explicit([(pair.student, pair.teacher, pair.weight) for pair in pairs], *depths)
    except UsageError as error:
        diagnostics.problems.append(Problem((*place, "layers"), one_line(error)))
        return None
