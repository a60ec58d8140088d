"""Strategies that choose the layers of a conversion, with a budget."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from xarch_kd.mapping_file.scalars import ConfigModel, LayerIndex

ChoiceStrategy = Literal["sensitivity", "one_in", "greedy", "gates", "window", "uniform", "random"]
Metric = Literal["kl", "recall", "both"]

# Steps of `aligned: true`.
ALIGNED_STEPS: Final = 24

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) ?(B|KiB|MiB|GiB)")
_UNITS: Final = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _size(value: str) -> str:
    if _SIZE.fullmatch(value) is None:
        raise ValueError(f"'{value}' is not a size: write a number with B, KiB, MiB or GiB, e.g. 64MiB")
    return value


class CacheBudget(ConfigModel):
    """Bytes that cache and recurrent states of one sequence may take after `at_context` tokens, e.g. `64MiB`."""

    cache_bytes: Annotated[str, AfterValidator(_size)]
    at_context: Annotated[int, Field(ge=1)]

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        found = _SIZE.fullmatch(self.cache_bytes)
        assert found is not None
        return int(float(found[1]) * _UNITS[found[2]])


class LayerStrategy(ConfigModel):
    """Choice of layers by a strategy: as many as `budget` allows.

    `budget` is a number of layers, a share of them, or the bytes of the student's cache at a context length.
    `sensitivity` puts one new mixer at a time into the teacher and keeps the attention of the layers that suffer most,
    by `metric`: the KL divergence on about `tokens` tokens of training text, the loss on text that is to be recalled,
    or the mean of both ranks. `one_in` puts one layer of attention at a time into a student without any, `greedy`
    replaces one layer after another, the one that costs least beside those before it, `gates` trains for `steps` steps
    how much of each layer's attention a model needs that mixes it with the new mixers, and `window` measures as
    `sensitivity` does, with a sliding window of attention in place of the new mixer. `uniform` spaces the layers
    evenly, `random` draws them with `seed` (the run's by default). `always` and `never` are layers that are certainly
    chosen, or not; `spacing` is the smallest distance of two layers that keep attention. `aligned` first trains each
    new mixer alone on its attention's output, for that many steps (24 for true); the student starts with these mixers.
    """

    strategy: ChoiceStrategy = "sensitivity"
    budget: int | float | CacheBudget
    always: tuple[LayerIndex, ...] = ()
    never: tuple[LayerIndex, ...] = ()
    spacing: Annotated[int, Field(ge=1)] = 1
    metric: Metric = "kl"
    tokens: Annotated[int, Field(ge=64)] = 512
    steps: Annotated[int, Field(ge=1)] = 200
    aligned: bool | Annotated[int, Field(ge=1)] = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None

    @property
    def aligned_steps(self) -> int:
        """Steps for which new mixers are trained before they are measured."""
        return ALIGNED_STEPS * self.aligned if isinstance(self.aligned, bool) else self.aligned

    @property
    def is_measured(self) -> bool:
        """True if the layers follow from measurements with both models' weights."""
        return self.strategy not in ("uniform", "random")

    @model_validator(mode="after")
    def _budget_in_range(self) -> LayerStrategy:
        budget = self.budget
        if isinstance(budget, int) and budget < 1:
            raise ValueError(f"budget must be at least 1 layer, found {budget}: for no layer at all write none")
        if isinstance(budget, float) and not 0 < budget < 1:
            raise ValueError(f"budget is a whole number of layers, or a share between 0 and 1, found {budget}")
        return self

    @model_validator(mode="after")
    def _fits_the_strategy(self) -> LayerStrategy:
        both = sorted(set(self.always) & set(self.never))
        if both:
            raise ValueError(f"layers are both in always and in never: {', '.join(map(str, both))}")
        ignored = [
            name for name in ("metric", "tokens", "aligned") if name in self.model_fields_set and not self.is_measured
        ]
        if self.strategy == "uniform":
            ignored += [name for name in ("spacing", "seed") if name in self.model_fields_set]
        if self.strategy != "gates":
            ignored += [name for name in ("steps",) if name in self.model_fields_set]
        if self.strategy == "greedy":
            ignored += [name for name in ("spacing",) if name in self.model_fields_set]
        if ignored:
            raise ValueError(f"strategy: {self.strategy} has no {', '.join(ignored)}: leave it out")
        return self
