"""Teacher and student of a plan: config, a model without storage, and its layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from xarch_kd.mapping_file.layer_choice import LayerStrategy
from xarch_kd.mapping_file.schema import ConversionOptions, Paths
from xarch_kd.models.in_place.teachers import WINDOW
from xarch_kd.models.loading.load import meta_model
from xarch_kd.planning.custom import CustomObjects
from xarch_kd.planning.layer_choice import LayerSelection
from xarch_kd.planning.plan import LayerRow, ModelSummary
from xarch_kd.taps.layout import Layout, layout_of


@dataclass(frozen=True)
class ModelHandle:
    """Teacher or student without storage. `dtype` is that of its weights."""

    reference: str
    config: PreTrainedConfig
    layout: Layout
    dtype: str

    @classmethod
    def of(cls, reference: str, config: PreTrainedConfig, paths: Paths | None, dtype: str) -> ModelHandle:
        """Return the handle of `config`. Raises `TapError` for a family that is not known and has no `paths`."""
        return cls(reference, config, layout_of(meta_model(config), paths), dtype)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.layout.blocks)

    @property
    def vocabulary(self) -> int:
        """Number of rows of the embedding."""
        return int(self.layout.model.get_input_embeddings().weight.shape[0])  # type: ignore[arg-type]

    @cached_property
    def names(self) -> dict[int, str]:
        """Parameter names by identity."""
        return {id(parameter): name for name, parameter in self.layout.model.named_parameters()}

    def names_of(self, parameters: Iterable[Tensor]) -> set[str]:
        """Return the names of parameters of this model."""
        return {self.names[id(parameter)] for parameter in parameters}

    def reached(self, tap: str, layer: int | None, *, alone: bool) -> set[str]:
        """Return names of parameters that the tensor at a tap depends on; `alone`: the block is fed from outside."""
        layout = self.layout
        if layer is None:
            module = layout.embedding if tap == "embedding" else layout.base
            return self.names_of(module.parameters())
        inside = self.names_of(layout.blocks[layer].parameters())
        if tap in ("mixer_input", "mixer_output", "mixing", "values") and layout.mlps is not None:
            inside -= self.names_of(layout.mlps[layer].parameters())
        if tap == "mixer_input":
            inside -= self.names_of(layout.mixers[layer].parameters())
        if alone:
            return inside
        below = {name for block in layout.blocks[:layer] for name in self.names_of(block.parameters())}
        return inside | below | self.names_of(layout.embedding.parameters())

    def summary(self, replaced: Iterable[int] = ()) -> ModelSummary:
        """Return the summary that a plan shows."""
        chosen = set(replaced)
        rows = (
            LayerRow(index=index, mixer=kind, replaced=index in chosen)
            for index, kind in enumerate(self.layout.mixer_kinds)
        )
        return ModelSummary(
            reference=self.reference,
            model_type=self.config.model_type,
            layers=tuple(rows),
            dim=self.layout.dim,
            vocabulary=self.vocabulary,
            parameters=parameter_count(self.layout.model),
            dtype=self.dtype,
        )


def replaced_layers(teacher: ModelHandle, student: ModelHandle) -> tuple[int, ...]:
    """Return the blocks whose mixer is of another kind than the teacher's; none when the depths differ."""
    if teacher.depth != student.depth:
        return ()
    config: Any = student.layout.model.config
    if getattr(config, "mixer", None) == WINDOW:
        # Its mixers are of the teacher's kind.
        return tuple(config.replaced_layers)
    kinds = zip(teacher.layout.mixer_kinds, student.layout.mixer_kinds, strict=True)
    return tuple(index for index, (own, other) in enumerate(kinds) if own != other)


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a module, tied ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class ModelPair:
    """Both models, the student's blocks with replaced mixers, and the result of a calibration pass.

    `similarities` are [student layers, teacher layers] by `entry_key`; `frozen` are parameters of the student that no
    stage may train; `inherits` is true for a student converted from the teacher, `fresh` for an untrained one;
    `calibration` is the number of tokens of a calibration pass; `custom` are the objects passed from Python;
    `warnings` are those of the conversion, `conversion` its options with a plain list of layers where the mapping has a
    strategy, `strategy` that with a number or share of layers as its budget, `selection` the measurements that the list
    follows from.
    """

    teacher: ModelHandle
    student: ModelHandle
    replaced: tuple[int, ...]
    similarities: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    inherits: bool = False
    fresh: bool = False
    calibration: int = 16_384
    custom: CustomObjects = field(default_factory=CustomObjects)
    warnings: tuple[str, ...] = ()
    conversion: ConversionOptions | None = None
    strategy: LayerStrategy | None = None
    selection: LayerSelection | None = None
