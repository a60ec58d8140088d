"""What can be read in a model: taps, layers, shapes and modules, from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from xarch_kd.taps.layout import Layout, layout_of


@dataclass(frozen=True, kw_only=True)
class TapRow:
    """One line of `xarch-kd inspect`.

    `layers` are the blocks that it holds for (none for taps of the whole model), `module` the path of the module that
    is read with `*` for the block's index, `reads` which side of it, `kind` the mixer's kind for mixer taps.
    """

    tap: str
    layers: tuple[int, ...]
    shape: tuple[str, str, int]
    module: str
    reads: str
    kind: str | None


def inspect_model(
    model: PreTrainedModel | PreTrainedConfig | Layout, paths: Mapping[str, str | None] | object | None = None
) -> tuple[TapRow, ...]:
    """List the taps of `model`; nothing is run and no weight is read, so a config or a meta model is enough.

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
    for kind in dict.fromkeys(layout.mixer_kinds):
        layers = tuple(layer for layer in every if layout.mixer_kinds[layer] == kind)
        rows.append(_row(layout, "mixer_input", layers, layout.mixers[layers[0]], "input", kind))
        rows.append(_row(layout, "mixer_output", layers, layout.mixer_outputs[layers[0]], "output", kind))
    if layout.mlp_outputs is not None:
        rows.append(_row(layout, "mlp_output", every, layout.mlp_outputs[0], "output"))
    rows.append(
        _row(layout, "head_input", (), layout.base if layout.final_norm is None else layout.final_norm, "output")
    )
    return tuple(rows)


def _row(
    layout: Layout, tap: str, layers: tuple[int, ...], module: nn.Module, reads: str, kind: str | None = None
) -> TapRow:
    path = layout.path_of(module)
    if layers:
        blocks = layout.path_of(layout.container)
        path = path.replace(f"{blocks}.{layers[0]}", f"{blocks}.*", 1)
    shape = ("batch", "time", layout.width)
    return TapRow(tap=tap, layers=layers, shape=shape, module=path, reads=reads, kind=kind)
