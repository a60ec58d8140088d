"""Cases of `Mixing.apply`: M v without M, forward and backward, against the dense matrix times the values.

FLOPs, B sequences of T tokens, H heads with values of dim w: a mixer with a state of N numbers per value channel writes
and reads it at each token, 4BTHNw forward; the backward of a product costs twice its forward, hence 12BTHNw. The delta
rule reads the state once more to correct it: 18BTHNw. Softmax attention needs scores and sums over T(T+1)/2 pairs,
6BH(d+w) T(T+1)/2. A banded matrix of m taps needs 6BTHmw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.case import Case, Contender, Growth, Input, Inputs, Options, Run, Sizes


def mixing_of(options: Options, inputs: Inputs) -> Any:
    """Return the mixing of the case, from all inputs except the values."""
    import xarch_kd.mixing

    factors = {name: tensor for name, tensor in inputs.items() if name != "values"}
    more = {"scale": 1 / math.sqrt(factors["query"].shape[-1])} if options["kind"] == "SoftmaxMixing" else {}
    return getattr(xarch_kd.mixing, options["kind"])(**factors, **more)


def dense(options: Options) -> Run:
    """Return the matrix [batch, heads, time, time] times the values, mean of the squares."""

    def run(inputs: Inputs) -> Tensor:
        matrix = mixing_of(options, inputs).dense(limit=None)
        return torch.einsum("bhij,bjhw->bihw", matrix, inputs["values"]).square().mean()

    return run


def apply(options: Options) -> Run:
    """Return `apply`, mean of the squares."""
    return lambda inputs: mixing_of(options, inputs).apply(inputs["values"]).square().mean()


def attention(options: Options) -> Run:
    """Return PyTorch's own attention, mean of the squares."""

    def run(inputs: Inputs) -> Tensor:
        query, key, values = (inputs[name].transpose(1, 2) for name in ("query", "key", "values"))
        return functional.scaled_dot_product_attention(query, key, values, is_causal=True).square().mean()

    return run


def contenders(kind: str, largest: int) -> dict[str, Contender]:
    """Return the contenders; the dense one up to `largest` tokens."""
    found = {
        "dense": Contender(make=dense, source="xarch_kd, dense", ours=True, largest={"time": largest}),
        "apply": Contender(make=apply, source="xarch_kd", ours=True),
    }
    if kind == "SoftmaxMixing":
        found["sdpa"] = Contender(make=attention, source="torch.nn.functional.scaled_dot_product_attention")
    return found


def factor(*axes: str, deviation: float = 1.0, transform: str = "normal") -> Input:
    """Return a factor of a mixing with a gradient; axes after batch and time."""
    return Input(axes=("batch", "time", *axes), deviation=deviation, transform=transform, gradient=True)


HEADS: Final[Sizes] = {"batch": 1, "heads": 8, "width": 64, "state": 64, "groups": 1}
CHANNELS: Final[Sizes] = {"batch": 1, "heads": 64, "width": 1, "state": 16, "taps": 4}
ATTENTION_FACTORS: Final = {"query": factor("heads", "state"), "key": factor("heads", "state", deviation=0.125)}
DELTA_FACTORS: Final = {
    "query": factor("heads", "state", transform="unit"),
    "key": factor("heads", "state", transform="unit"),
    "beta": factor("heads", transform="share"),
    "log_decay": factor("heads", transform="decay"),
}


def flops_of_state(products: int) -> Callable[[Sizes], int]:
    """Return the FLOPs of a mixer with `products` products with its state per token, forward and backward."""

    def flops(sizes: Sizes) -> int:
        return 6 * products * sizes["batch"] * sizes["time"] * sizes["heads"] * sizes["state"] * sizes["width"]

    return flops


def flops_of_attention(sizes: Sizes) -> int:
    """Return the FLOPs of scores and weighted sums over the pairs of a causal map, forward and backward."""
    over = sizes["time"] * (sizes["time"] + 1) // 2
    return 6 * sizes["batch"] * sizes["heads"] * over * (sizes["state"] + sizes["width"])


def flops_of_band(sizes: Sizes) -> int:
    """Return the FLOPs of one product per tap, forward and backward."""
    return 6 * sizes["batch"] * sizes["time"] * sizes["heads"] * sizes["taps"] * sizes["width"]


# Group -> class, sizes, factors, FLOPs, largest number of tokens for the dense matrix.
MIXING_CASES: Final[Mapping[str, tuple[str, Sizes, Mapping[str, Input], Callable[[Sizes], int], int]]] = {
    "softmax": ("SoftmaxMixing", HEADS, ATTENTION_FACTORS, flops_of_attention, 4096),
    "ssd": (
        "SSDMixing",
        HEADS,
        {
            "C": factor("groups", "state", deviation=0.25),
            "B": factor("groups", "state", deviation=0.25),
            "dt": factor("heads", transform="positive"),
            "log_decay": factor("heads", transform="decay"),
        },
        flops_of_state(2),
        4096,
    ),
    "selective": (
        "SelectiveMixing",
        CHANNELS,
        {
            "C": factor("state", deviation=0.25),
            "B": factor("state", deviation=0.25),
            "dt": factor("heads", transform="positive"),
            "A": Input(axes=("heads", "state"), transform="decay", gradient=True),
        },
        flops_of_state(2),
        1024,
    ),
    "linear": ("LinearMixing", HEADS, ATTENTION_FACTORS, flops_of_state(2), 4096),
    "linear, decay of heads": (
        "LinearMixing",
        HEADS,
        {**ATTENTION_FACTORS, "log_decay": factor("heads", transform="decay")},
        flops_of_state(2),
        4096,
    ),
    "linear, decay of channels": (
        "LinearMixing",
        HEADS,
        {**ATTENTION_FACTORS, "log_decay": factor("heads", "state", transform="decay")},
        flops_of_state(2),
        1024,
    ),
    "delta": ("DeltaMixing", HEADS, DELTA_FACTORS, flops_of_state(3), 2048),
    "banded": (
        "BandedMixing",
        CHANNELS,
        {
            "taps": Input(axes=("heads", "taps"), gradient=True),
            "row_scale": factor("heads"),
            "column_scale": factor("heads"),
        },
        flops_of_band,
        2048,
    ),
}


def case(group: str, time: int) -> Case:
    """Return the case of a mixer at a sequence length, on the CPU."""
    kind, sizes, factors, flops, largest = MIXING_CASES[group]
    return Case(
        operation="mixing_apply",
        name=f"{group}, T={time}",
        group=group,
        axis="time",
        baseline="dense",
        sizes={**sizes, "time": time},
        quick={"time": 37, "heads": 2, **({"width": 8, "state": 16} if sizes["width"] > 1 else {})},
        proxy={"time": 256},
        inputs={**factors, "values": factor("heads", "width")},
        options={"kind": kind},
        contenders=contenders(kind, largest),
        flops=flops,
        dense_flops=None,
    )


CASES: Final[tuple[Case, ...]] = tuple(case(group, time) for group in MIXING_CASES for time in (512, 1024, 2048, 4096))
# The time of softmax attention is quadratic, whoever computes it.
GROWTHS: Final[tuple[Growth, ...]] = tuple(
    Growth(group=group, contender="apply", measure=measure, at_most=1.2)
    for group in MIXING_CASES
    for measure in ("time", "memory")
    if (group, measure) != ("softmax", "time")
)
