"""Modules of a student that get low-rank adapters (`train: [{lora: …}]`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from xarch_kd.mapping_file.schema import Stage
from xarch_kd.mapping_file.source_map import Problem, YamlPath
from xarch_kd.mapping_file.training import Lora
from xarch_kd.taps.layout import Layout

NAMES = {"attention": "attention layers", "mlp": "MLPs"}


@dataclass(frozen=True, kw_only=True)
class LoraPlan:
    """Adapters of a stage: names of the linear modules that get one, and their number of parameters."""

    options: Lora
    modules: tuple[str, ...]
    parameters: int

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights that the adapters change."""
        return tuple(f"{name}.weight" for name in self.modules)


def lora_plan(options: Lora, layout: Layout, replaced: Collection[int], frozen: Collection[str]) -> LoraPlan:
    """Return the adapters of `options` on a student: of attention in blocks that kept it, and of MLPs.

    Modules with a parameter in `frozen` get none.
    """
    wanted = {id(module) for part in options.on for module in _linears(layout, part, replaced)}
    found = {
        name: module
        for name, module in layout.model.named_modules()
        if id(module) in wanted and f"{name}.weight" not in frozen
    }
    sizes = (options.rank * sum(module.weight.shape) for module in found.values())  # type: ignore[misc, arg-type, union-attr]
    return LoraPlan(options=options, modules=tuple(found), parameters=int(sum(sizes)))


def _linears(layout: Layout, part: str, replaced: Collection[int]) -> Iterator[nn.Linear]:
    if part == "mlp":
        parents = layout.mlps or ()
    else:
        kinds = zip(layout.mixers, layout.mixer_kinds, strict=True)
        parents = tuple(
            mixer for index, (mixer, kind) in enumerate(kinds) if kind == "attention" and index not in replaced
        )
    for parent in parents:
        yield from (module for module in parent.modules() if type(module) is nn.Linear)


def lora_problems(stage: Stage, plan: LoraPlan | None, place: YamlPath) -> Iterator[Problem]:
    """Yield what keeps a stage from training its adapters: the package, nothing to adapt, the inputs of blocks."""
    if plan is None:
        return
    where = (*place, "train")
    if importlib.util.find_spec("peft") is None:
        yield Problem(where, "lora needs the package 'peft', which is not installed: pip install 'xarch_kd[lora]'")
    if not plan.modules:
        parts = " and ".join(NAMES[part] for part in plan.options.on)
        yield Problem(where, f"lora finds no linear module in the student's {parts}. Name other parts under on.")
    if stage.inputs == "teacher":
        yield Problem(where, "lora is for stages with inputs: student, which run the student's own attention and MLPs.")
