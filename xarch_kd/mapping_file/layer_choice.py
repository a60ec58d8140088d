"""Strategies that choose the layers of a conversion, with a budget."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from xarch_kd.mapping_file.scalars import ConfigModel, LayerIndex

ChoiceStrategy = Literal["sensitivity", "uniform", "random"]
Metric = Literal["kl", "recall", "both"]


class LayerStrategy(ConfigModel):
    """Choice of layers by a strategy: as many as `budget` allows.

    `budget` is a number of layers or a share of them.
    `sensitivity` puts one new mixer at a time into the teacher and keeps the attention of the layers that suffer most,
    by `metric`: the KL divergence on about `tokens` tokens of training text, the loss on text that is to be recalled,
    or the mean of both ranks. `uniform` spaces the layers evenly, `random` draws them with `seed` (the run's by
    default). `always` and `never` are layers that are certainly chosen, or not; `spacing` is the smallest distance of
    two layers that keep attention.
    """

    strategy: ChoiceStrategy = "sensitivity"
    budget: int | float
    always: tuple[LayerIndex, ...] = ()
    never: tuple[LayerIndex, ...] = ()
    spacing: Annotated[int, Field(ge=1)] = 1
    metric: Metric = "kl"
    tokens: Annotated[int, Field(ge=64)] = 512
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None

    @property
    def is_measured(self) -> bool:
        """True if the layers follow from measurements with both models' weights."""
        return self.strategy == "sensitivity"

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
        ignored = [name for name in ("metric", "tokens") if name in self.model_fields_set and not self.is_measured]
        if self.strategy == "uniform":
            ignored += [name for name in ("spacing", "seed") if name in self.model_fields_set]
        if ignored:
            raise ValueError(f"strategy: {self.strategy} has no {', '.join(ignored)}: leave it out")
        return self
