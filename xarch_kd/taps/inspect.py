"""Listing of the taps of a model, with layers, shapes and modules, from its config alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import TapError
from xarch_kd.taps.layout import Layout, layout_of
from xarch_kd.taps.mixings import mixing_tap


@dataclass(frozen=True, kw_only=True)
class TapRow:
    """One line of `xarch-kd inspect`.

    `layers` are the blocks that have the tap (none for taps of the whole model), `module` the path of the hooked module
    with `*` for the block's index, `reads` its input or output, `kind` the mixer's kind for mixer taps. A mixing is
    listed with the shape of its matrix; it is stored as factors, which are recorded `inside` the mixer, as are its
    values.
    """

    tap: str
    layers: tuple[int, ...]
    shape: tuple[str | int, ...]
    module: str
    reads: str
    kind: str | None


def inspect_model(
    model: PreTrainedModel | PreTrainedConfig | Layout, paths: Mapping[str, str | None] | object | None = None
) -> tuple[TapRow, ...]:
    """List the taps of `model` without running it or reading weights: a config or a meta model is enough.

    Raises TapError for a model type outside the table when no `paths` are given.
    """
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"):
            layout = layout_of(AutoModelForCausalLM.from_config(model), paths)
    else:
        layout = layout_of(model, paths)
    every = tuple(range(len(layout.blocks)))
    rows = [
        _row(layout, "embedding", (), layout.blocks[0], "input"),
        _row(layout, "hidden", every, layout.blocks[0], "output"),
    ]
    for layers in _alike(layout, layout.mixers, layout.mixer_outputs, kinds=layout.mixer_kinds):
        first, kind = layers[0], layout.mixer_kinds[layers[0]]
        rows.append(_row(layout, "mixer_input", layers, layout.mixers[first], "input", kind))
        rows.append(_row(layout, "mixer_output", layers, layout.mixer_outputs[first], "output", kind))
        if _has_mixing(layout, first):
            for tap, shape in (("mixing", ("heads", "time", "time")), ("values", ("time", "heads", "dim"))):
                inside = _row(layout, tap, layers, layout.mixers[first], "inside", kind)
                rows.append(dataclasses.replace(inside, shape=("batch", *shape)))
    if layout.mlp_outputs is not None:
        for layers in _alike(layout, layout.mlp_outputs):
            rows.append(_row(layout, "mlp_output", layers, layout.mlp_outputs[layers[0]], "output"))
    rows.append(
        _row(layout, "head_input", (), layout.base if layout.final_norm is None else layout.final_norm, "output")
    )
    return tuple(rows)


def _alike(
    layout: Layout, *modules: Sequence[nn.Module], kinds: Sequence[str] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Group blocks by the paths of `modules` inside the block, and by `kinds`."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for layer, own in enumerate(zip(*modules, strict=True)):
        places = (_path(layout, module, layer) for module in own)
        groups.setdefault((*places, kinds[layer] if kinds else ""), []).append(layer)
    return tuple(tuple(layers) for layers in groups.values())


def _has_mixing(layout: Layout, layer: int) -> bool:
    try:
        mixing_tap(layout, layer)
    except TapError:
        return False
    return True


def _path(layout: Layout, module: nn.Module, layer: int) -> str:
    blocks = layout.path_of(layout.container)
    return layout.path_of(module).replace(f"{blocks}.{layer}", f"{blocks}.*", 1)


def _row(
    layout: Layout, tap: str, layers: tuple[int, ...], module: nn.Module, reads: str, kind: str | None = None
) -> TapRow:
    path = _path(layout, module, layers[0]) if layers else layout.path_of(module)
    shape = ("batch", "time", layout.dim)
    return TapRow(tap=tap, layers=layers, shape=shape, module=path, reads=reads, kind=kind)
