"""Benchmark cases as data: inputs, contenders, costs and bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Sizes = Mapping[str, int]
Options = Mapping[str, Any]
Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]
Measure = Literal["time", "memory", "roofline"]

# Name → function from normally distributed numbers to an input of an operation.
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda values: values,
    "positive": functional.softplus,
    "decay": lambda values: -functional.softplus(values - 3),
    "share": torch.sigmoid,
    "unit": lambda values: functional.normalize(values, dim=-1),
}


@dataclass(frozen=True, kw_only=True)
class Input:
    """One tensor of a case: the axes of its shape and the distribution of its entries.

    `deviation` is a number, or the name of an axis: 1 / sqrt(size of that axis). `like` names an earlier input of the
    same shape that is added to it.
    """

    axes: tuple[str, ...]
    deviation: float | str = 1.0
    transform: str = "normal"
    gradient: bool = False
    like: str | None = None

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape at these sizes."""
        return tuple(sizes[axis] for axis in self.axes)

    def draw(self, sizes: Sizes, generator: torch.Generator) -> Tensor:
        """Return the tensor in float32 on the CPU."""
        scale = 1 / math.sqrt(sizes[self.deviation]) if isinstance(self.deviation, str) else self.deviation
        return TRANSFORMS[self.transform](torch.randn(self.shape(sizes), generator=generator) * scale)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An implementation of the case: `make(options)` returns the function from inputs to a scalar.

    `options` are the case's options and sizes, from which `make` builds everything that is not an input tensor. `needs`
    names requirements (keys of `peers.REQUIREMENTS`). Above the sizes of `largest` the contender is not measured,
    because it takes too long or too much memory. `truth` names the contender whose float64 result is the reference of
    this one's error (None: the case's baseline). With `--against`, those that are `ours` are also measured at another
    revision.
    """

    make: Callable[[Options], Run]
    source: str
    ours: bool = False
    needs: tuple[str, ...] = ()
    largest: Mapping[str, int] = field(default_factory=dict)
    truth: str | None = None


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Bound of a contender: on a ratio to `against` (None: the baseline), or on a share of the roofline."""

    contender: str
    measure: Measure
    at_most: float | None = None
    at_least: float | None = None
    against: str | None = None


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Bound on a contender's growth over the cases of a group: the slope of log(measure) against log(axis)."""

    group: str
    contender: str
    measure: Measure
    at_most: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One computation: inputs, costs, contenders and bounds.

    `flops` are those of the task (multiplications and additions of its matrix products; a causal half is a half),
    `dense_flops` those of the baseline (None: not stated). `quick` and `proxy` replace sizes: in a smoke run, and for
    the error against float64 if the dense computation in float64 would be too large. Cases of one `group` differ in
    `axis`. `whole` describes a call that is not a value with gradients of the inputs: it may have a state, as a
    training step has, and its error is not measured. `warm` replaces sizes in the first call, before anything is
    measured, if a whole one would take minutes; each repeat is then one call.
    """

    operation: str
    name: str
    group: str
    baseline: str
    sizes: Sizes
    quick: Sizes
    inputs: Mapping[str, Input]
    contenders: Mapping[str, Contender]
    flops: Callable[[Sizes], int]
    dense_flops: Callable[[Sizes], int] | None
    axis: str | None = None
    options: Options = field(default_factory=dict)
    proxy: Sizes = field(default_factory=dict)
    warm: Sizes = field(default_factory=dict)
    whole: str | None = None
    bounds: tuple[Bound, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def bytes(self, sizes: Sizes) -> int:
        """Return the unavoidable traffic in bytes: each input read once, each gradient written once."""
        width = torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()
        return sum(math.prod(one.shape(sizes)) * width * (2 if one.gradient else 1) for one in self.inputs.values())

    def draw(self, sizes: Sizes, device: str) -> Inputs:
        """Return the inputs, drawn from the seed; those with a gradient are leaves that require one."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn: Inputs = {}
        for name, one in self.inputs.items():
            values = one.draw(sizes, generator).to(device=device, dtype=getattr(torch, self.dtype))
            values = values if one.like is None else values + drawn[one.like].detach()
            drawn[name] = values.requires_grad_(one.gradient)
        return drawn
