"""Cases of `projected_distance`: a linear projector and a distance of each token, forward and backward.

FLOPs, n tokens, dims s and t: the projection 2nst, gradients of the features 2nst and of the projector 2nst. No part of
it can be left out, so the naive computation needs the same. Elementwise work is not included.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.case import Case, Contender, Growth, Input, Inputs, Options, Run, Sizes

# As in the operation, so that the two compute the same number.
EPSILON: Final = 1e-6


def naive(options: Options) -> Run:
    """Return the naive computation: all tokens projected, the distance of each by definition, mean over tokens."""
    distance = options["distance"]

    def run(inputs: Inputs) -> Tensor:
        teacher = inputs["teacher"]
        projected = functional.linear(inputs["student"], inputs["weight"])
        if distance == "cosine":
            lengths = [(side.square().sum(-1) + EPSILON).sqrt() for side in (projected, teacher)]
            return (1 - (projected * teacher).sum(-1) / (lengths[0] * lengths[1])).mean()
        squared = (projected - teacher).square().sum(-1)
        return (squared / (teacher.square().sum(-1) + EPSILON)).mean()

    return run


def compiled(options: Options) -> Run:
    """Return the naive computation under torch.compile."""
    return torch.compile(naive(options))


def ours(impl: str) -> Contender:
    """Return the contender of one implementation of `xarch_kd.ops.projected_distance`."""

    def make(options: Options) -> Run:
        from xarch_kd.ops.projected_distance import projected_distance

        def run(inputs: Inputs) -> Tensor:
            given: dict[str, Any] = dict(inputs)
            return projected_distance(**given, distance=options["distance"], epsilon=EPSILON, impl=impl).total

        return run

    return Contender(make=make, source="xarch_kd", ours=True, needs=("gpu",) if impl == "fused" else ())


CONTENDERS: Final[dict[str, Contender]] = {
    "naive": Contender(make=naive, source="PyTorch, eager"),
    "torch.compile": Contender(make=compiled, source="PyTorch, the naive computation compiled", needs=("compiler",)),
    "reference": ours("reference"),
    "streaming": ours("streaming"),
    "fused": ours("fused"),
}


def flops(sizes: Sizes) -> int:
    """Return the FLOPs of the projection and the gradients of both of its factors."""
    return 6 * sizes["tokens"] * sizes["student_width"] * sizes["teacher_width"]


def case(distance: str, tokens: int) -> Case:
    """Return a case on the CPU."""
    return Case(
        operation="projected_distance",
        name=f"{distance}, n={tokens}",
        group=f"{distance} over n",
        axis="tokens",
        baseline="naive",
        sizes={"tokens": tokens, "student_width": 576, "teacher_width": 2048},
        quick={"tokens": 33, "student_width": 16, "teacher_width": 24},
        inputs={
            "student": Input(axes=("tokens", "student_width"), gradient=True),
            "teacher": Input(axes=("tokens", "teacher_width")),
            "weight": Input(axes=("teacher_width", "student_width"), deviation="student_width", gradient=True),
        },
        options={"distance": distance},
        contenders=CONTENDERS,
        flops=flops,
        dense_flops=flops,
    )


def large(distance: str) -> Case:
    """Return a case on a GPU, in bfloat16, at the hidden sizes of 2 B and 8 B models."""
    return dataclasses.replace(
        case(distance, 8192),
        name=f"{distance}, gpu",
        group=f"{distance}, gpu",
        axis=None,
        sizes={"tokens": 8192, "student_width": 2048, "teacher_width": 4096},
        device="cuda",
        dtype="bfloat16",
    )


CASES: Final[tuple[Case, ...]] = (
    *(case(distance, tokens) for distance in ("normalised_mse", "cosine") for tokens in (1024, 4096, 16384)),
    large("normalised_mse"),
    large("cosine"),
)
GROWTHS: Final[tuple[Growth, ...]] = ()
