"""Cases of `linear_divergence`: next-token distributions from hidden states and heads, forward and backward.

FLOPs, n tokens, V entries, hidden sizes s and t: logits 2nV(s+t), gradient of the hidden states 2nVs, of the head 2nVs.
No part of it can be left out, so the naive computation needs the same. Elementwise work is not included.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.case import Bound, Case, Contender, Growth, Input, Inputs, Options, Run, Sizes
from benchmarks.peers import load_trl_chunked, load_trl_dense

# GKD's beta: 0 is forward KL, between 0 and 1 the generalized JSD.
BETA: Final = {"forward_kl": 0.0, "jsd": 0.5}


def logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's logits [tokens, vocabulary]."""
    with torch.no_grad():
        teacher = functional.linear(inputs["teacher_hidden"], inputs["teacher_weight"])
    return functional.linear(inputs["student_hidden"], inputs["student_weight"]), teacher


def naive(options: Options) -> Run:
    """Return the naive computation: all logits, their log-softmax, the divergence by definition, mean over tokens."""
    beta = BETA[options["divergence"]]

    def run(inputs: Inputs) -> Tensor:
        student, teacher = logits(inputs)
        log_q, log_p = functional.log_softmax(student, -1), functional.log_softmax(teacher, -1)
        if beta == 0:
            return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        p, q = log_p.exp(), log_q.exp()
        log_middle = (beta * p + (1 - beta) * q).log()
        from_teacher = (p * (log_p - log_middle)).sum(-1)
        from_student = (q * (log_q - log_middle)).sum(-1)
        return (beta * from_teacher + (1 - beta) * from_student).mean()

    return run


def lean(options: Options) -> Run:
    """Return the JSD in the fewest passes that PyTorch's functions allow: `logaddexp` and `kl_div` of logarithms."""
    share = BETA[options["divergence"]]

    def run(inputs: Inputs) -> Tensor:
        student, teacher = logits(inputs)
        log_q, log_p = functional.log_softmax(student, -1), functional.log_softmax(teacher, -1)
        middle = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
        from_teacher = functional.kl_div(middle, log_p, reduction="batchmean", log_target=True)
        from_student = functional.kl_div(middle, log_q, reduction="batchmean", log_target=True)
        return share * from_teacher + (1 - share) * from_student

    return run


def compiled(options: Options) -> Run:
    """Return the naive computation under torch.compile."""
    return torch.compile(naive(options))


def ours(impl: str) -> Contender:
    """Return the contender of one implementation of `xarch_kd.ops.linear_divergence`."""

    def make(options: Options) -> Run:
        from xarch_kd.ops.linear_divergence import linear_divergence

        def run(inputs: Inputs) -> Tensor:
            given = [inputs[f"{side}_{part}"] for side in ("student", "teacher") for part in ("hidden", "weight")]
            return linear_divergence(*given, divergence=options["divergence"], impl=impl).total

        return run

    return Contender(make=make, source="xarch_kd", ours=True, needs=("gpu",) if impl == "fused" else ())


def liger_chunked(compiled: bool) -> Contender:
    """Return Liger's chunked JSD with a hard loss of weight 0, at its default chunk of 1024 tokens."""

    def make(options: Options) -> Run:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[options["divergence"]], compiled=compiled
        )

        def run(inputs: Inputs) -> Tensor:
            hidden = inputs["student_hidden"]
            labels = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
            return loss(**named_as_in_liger(inputs), true_labels=labels)

        return run

    needs = ("liger", "compiler") if compiled else ("liger",)
    return Contender(make=make, source="liger_kernel.chunked_loss", needs=needs)


def named_as_in_liger(inputs: Inputs) -> Inputs:
    """Return the inputs by the argument names of Liger's modules."""
    return {name.replace("hidden", "input"): tensor for name, tensor in inputs.items()}


def liger_triton(options: Options) -> Run:
    """Return Liger's fused linear JSD: Triton kernels over chunks of tokens."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=BETA[options["divergence"]])
    return lambda inputs: loss(**named_as_in_liger(inputs), shift_labels=None)


def trl_chunked(options: Options) -> Run:
    """Return TRL's chunked divergence: tiles of 4096 tokens and 32768 entries, recomputed in the backward pass."""
    function, beta = load_trl_chunked(), BETA[options["divergence"]]

    def run(inputs: Inputs) -> Tensor:
        rows, _ = function.apply(
            inputs["student_hidden"],
            inputs["student_weight"],
            None,
            inputs["teacher_hidden"],
            inputs["teacher_weight"],
            None,
            beta,
        )
        return rows.mean()

    return run


def trl_dense(options: Options) -> Run:
    """Return TRL's GKD loss on all logits, summed over the vocabulary, mean over tokens."""
    loss, beta = load_trl_dense(), BETA[options["divergence"]]

    def run(inputs: Inputs) -> Tensor:
        student, teacher = logits(inputs)
        return loss(student, teacher, beta=beta, reduction="sum") / student.shape[0]

    return run


CONTENDERS: Final[dict[str, Contender]] = {
    "naive": Contender(make=naive, source="PyTorch, eager"),
    "torch.compile": Contender(make=compiled, source="PyTorch, the naive computation compiled", needs=("compiler",)),
    "liger chunked": liger_chunked(compiled=False),
    "liger chunked, compiled": liger_chunked(compiled=True),
    "liger triton": Contender(make=liger_triton, source="liger_kernel.transformers", needs=("liger", "gpu")),
    "trl chunked": Contender(make=trl_chunked, source="trl.kernels.chunked_divergence", needs=("trl chunked",)),
    "trl dense": Contender(make=trl_dense, source="trl.experimental.gkd", needs=("trl dense",)),
    "reference": ours("reference"),
    "streaming": ours("streaming"),
    "fused": ours("fused"),
}


def inputs(*, head_is_trained: bool = True) -> dict[str, Input]:
    """Return the four tensors; logits have a standard deviation of 1."""
    return {
        "student_hidden": Input(axes=("tokens", "student_width"), gradient=True),
        "student_weight": Input(
            axes=("vocabulary", "student_width"), deviation="student_width", gradient=head_is_trained
        ),
        "teacher_hidden": Input(axes=("tokens", "teacher_width")),
        "teacher_weight": Input(axes=("vocabulary", "teacher_width"), deviation="teacher_width"),
    }


def flops(sizes: Sizes) -> int:
    """Return the FLOPs of both logits and both gradients."""
    return 2 * sizes["tokens"] * sizes["vocabulary"] * (3 * sizes["student_width"] + sizes["teacher_width"])


def flops_of_a_frozen_head(sizes: Sizes) -> int:
    """Return the FLOPs of both logits and the gradient of the hidden states."""
    return 2 * sizes["tokens"] * sizes["vocabulary"] * (2 * sizes["student_width"] + sizes["teacher_width"])


def case(name: str, divergence: str, tokens: int, vocabulary: int, *bounds: Bound) -> Case:
    """Return a case on the CPU with the hidden size of SmolLM2-135M."""
    return Case(
        operation="linear_divergence",
        name=name,
        group=name,
        baseline="naive",
        sizes={"tokens": tokens, "vocabulary": vocabulary, "student_width": 576, "teacher_width": 576},
        quick={"tokens": 24, "vocabulary": 130, "student_width": 16, "teacher_width": 24},
        proxy={"tokens": 64},
        inputs=inputs(),
        options={"divergence": divergence},
        contenders=CONTENDERS,
        flops=flops,
        dense_flops=flops,
        bounds=bounds,
    )


def ratios(time: float | None, memory: float, contender: str = "streaming") -> tuple[Bound, ...]:
    """Return the bounds on a contender's time and memory as shares of the baseline's."""
    bounds = [Bound(contender=contender, measure="memory", at_most=memory)]
    return (*bounds, Bound(contender=contender, measure="time", at_most=time)) if time is not None else tuple(bounds)


# Against the code of GKD users.
BESIDE_GKD: Final = tuple(
    Bound(contender="streaming", measure=measure, at_most=bound, against="trl dense")
    for measure, bound in (("time", 0.5), ("memory", 0.2))
)
AHEAD_OF_LIGER: Final = tuple(
    Bound(contender="streaming", measure=measure, at_most=1.0, against=peer)
    for peer in ("liger chunked", "liger chunked, compiled")
    for measure in ("time", "memory")
)
JSD: Final = dataclasses.replace(
    case("jsd", "jsd", 1024, 49152, *ratios(0.5, 0.2), *BESIDE_GKD, *AHEAD_OF_LIGER),
    contenders={**CONTENDERS, "lean": Contender(make=lean, source="PyTorch, eager, logaddexp and kl_div")},
)
FORWARD_KL: Final = case("forward_kl", "forward_kl", 1024, 49152, *ratios(0.8, 0.2))
FROZEN: Final = dataclasses.replace(
    case("forward_kl, frozen head", "forward_kl", 1024, 49152, *ratios(None, 0.05)),
    inputs=inputs(head_is_trained=False),
    flops=flops_of_a_frozen_head,
    dense_flops=flops_of_a_frozen_head,
)


def large(divergence: str) -> Case:
    """Return a case on a GPU, in bfloat16, at the sizes of 2 B and 8 B models."""
    return dataclasses.replace(
        case(f"{divergence}, gpu", divergence, 8192, 128256),
        sizes={"tokens": 8192, "vocabulary": 128256, "student_width": 2048, "teacher_width": 4096},
        proxy={"tokens": 256},
        device="cuda",
        dtype="bfloat16",
        bounds=(Bound(contender="fused", measure="roofline", at_least=0.75),),
    )


VOCABULARIES: Final = (8192, 16384, 32768, 65536, 131072)
CASES: Final[tuple[Case, ...]] = (
    FORWARD_KL,
    JSD,
    FROZEN,
    *(
        dataclasses.replace(
            case(f"forward_kl, V={vocabulary}", "forward_kl", 256, vocabulary),
            group="forward_kl over V",
            axis="vocabulary",
        )
        for vocabulary in VOCABULARIES
    ),
    large("forward_kl"),
    large("jsd"),
)
GROWTHS: Final[tuple[Growth, ...]] = ()
