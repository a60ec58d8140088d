"""Cases of `similarity`: debiased CKA of two layers' features of the same tokens. It has no gradient.

FLOPs, n tokens, dims s and t: the three products of features 2ns², 2nt² and 2nst. The two Gram matrices of the dense
computation need 2n²s and 2n²t. Elementwise work is not included.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.case import Case, Contender, Growth, Input, Inputs, Options, Run, Sizes


def hsic(first: Tensor, second: Tensor) -> Tensor:
    """Return HSIC_1 of two Gram matrices with a zero diagonal (Song et al. 2012)."""
    count = first.shape[0]
    together = (first * second).sum()
    apart = first.sum() * second.sum() / ((count - 1) * (count - 2))
    rows = (first.sum(0) * second.sum(0)).sum()
    return (together + apart - 2 / (count - 2) * rows) / (count * (count - 3))


def naive(options: Options) -> Run:
    """Return the naive computation: both Gram matrices [tokens, tokens], HSIC_1 of their pairs, the ratio."""

    def run(inputs: Inputs) -> Tensor:
        grams = [features @ features.T for features in (inputs["student"], inputs["teacher"])]
        student, teacher = (gram.fill_diagonal_(0) for gram in grams)
        return hsic(student, teacher) / (hsic(student, student) * hsic(teacher, teacher)).sqrt()

    return run


def compiled(options: Options) -> Run:
    """Return the naive computation under torch.compile."""
    return torch.compile(naive(options))


def ours(impl: str, dtype: torch.dtype = torch.float64) -> Contender:
    """Return the contender of one implementation of `xarch_kd.ops.similarity`, with sums in `dtype`."""

    def make(options: Options) -> Run:
        from xarch_kd.ops.similarity import similarity

        def run(inputs: Inputs) -> Tensor:
            given: dict[str, Any] = dict(inputs)
            return similarity(**given, impl=impl, dtype=dtype).total

        return run

    return Contender(make=make, source="xarch_kd", ours=True, largest={"tokens": 8192} if impl == "reference" else {})


CONTENDERS: Final[dict[str, Contender]] = {
    "naive": Contender(make=naive, source="PyTorch, eager", largest={"tokens": 16384}),
    "torch.compile": Contender(
        make=compiled, source="PyTorch, the naive computation compiled", needs=("compiler",), largest={"tokens": 8192}
    ),
    "reference": ours("reference"),
    "streaming": ours("streaming"),
    "streaming, float32": ours("streaming", torch.float32),
}


def flops(sizes: Sizes) -> int:
    """Return the FLOPs of the products of the features with themselves and with each other."""
    student, teacher = sizes["student_width"], sizes["teacher_width"]
    return 2 * sizes["tokens"] * (student**2 + teacher**2 + student * teacher)


def dense_flops(sizes: Sizes) -> int:
    """Return the FLOPs of two Gram matrices."""
    return 2 * sizes["tokens"] ** 2 * (sizes["student_width"] + sizes["teacher_width"])


def case(tokens: int) -> Case:
    """Return a case on the CPU: the teacher's features are the student's plus noise of the same size."""
    return Case(
        operation="similarity",
        name=f"cka, n={tokens}",
        group="cka over n",
        axis="tokens",
        baseline="naive",
        sizes={"tokens": tokens, "student_width": 576, "teacher_width": 576},
        quick={"tokens": 33, "student_width": 16, "teacher_width": 16},
        proxy={"tokens": min(tokens, 2048)},
        inputs={
            "student": Input(axes=("tokens", "student_width")),
            "teacher": Input(axes=("tokens", "teacher_width"), like="student"),
        },
        contenders=CONTENDERS,
        flops=flops,
        dense_flops=dense_flops,
    )


CASES: Final[tuple[Case, ...]] = tuple(case(tokens) for tokens in (1024, 4096, 16384))
GROWTHS: Final[tuple[Growth, ...]] = ()
