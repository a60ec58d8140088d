"""Cases of `mixing_distance`: a teacher's mixing matrix against a student's, forward and backward.

FLOPs, B sequences of T tokens, H heads of dim d, G groups of state N, over p pairs (i, j) of tokens: the scores of a
softmax map 2BHpd, the products C·B of an SSD matrix 2BGpN, the gradients of a student's two factors twice that of its
forward. The dense computation has p = T², the task p = T(T+1)/2. Elementwise work, at least one exponential per pair
and head, is not included, although it costs as much on many devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.case import Bound, Case, Contender, Growth, Input, Inputs, Options, Run, Sizes

# As in the operation, so that the two compute the same number.
EPSILON: Final = 1e-8
PROBES: Final = 64


def causal(time: int, device: torch.device) -> Tensor:
    """Return the mask of causal pairs, bool [time, time]."""
    return torch.ones(time, time, dtype=torch.bool, device=device).tril()


def log_attention(query: Tensor, key: Tensor) -> Tensor:
    """Return the log of a causal attention map [batch, heads, time, time] from [batch, time, heads, width]."""
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[-1])
    hidden = ~causal(query.shape[1], query.device)
    return functional.log_softmax(scores.masked_fill(hidden, torch.finfo(scores.dtype).min), -1)


def ssd_matrix(factors: Inputs) -> Tensor:
    """Return the matrix of a Mamba-2 mixer [batch, heads, time, time] (arXiv 2405.21060): exp(Σ log decay) C·B dt."""
    total = factors["log_decay"].cumsum(1).transpose(1, 2)
    hidden = ~causal(total.shape[-1], total.device)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(hidden, -math.inf).exp()
    products = torch.einsum("bign,bjgn->bgij", factors["C"], factors["B"])
    repeated = products.repeat_interleave(decay.shape[1] // products.shape[1], 1)
    return repeated * decay * factors["dt"].transpose(1, 2)[..., None, :]


def sides(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """Return the teacher's factors and the student's, by field name of their mixings."""
    teacher = {name.removeprefix("teacher_"): one for name, one in inputs.items() if name.startswith("teacher_")}
    return teacher, {name: one for name, one in inputs.items() if not name.startswith("teacher_")}


def matrices(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the teacher's matrix, without a graph, and the matrix of a Mamba-2 student."""
    teacher, student = sides(inputs)
    with torch.no_grad():
        target = log_attention(teacher["query"], teacher["key"]).exp() if "query" in teacher else ssd_matrix(teacher)
    return target, ssd_matrix(student)


def naive_kl(options: Options) -> Run:
    """Return the naive computation: both log maps dense, Σ P (log P - log S) per row, mean over rows and heads."""

    def run(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            log_p = log_attention(inputs["teacher_query"], inputs["teacher_key"])
        log_s = log_attention(inputs["query"], inputs["key"])
        return functional.kl_div(log_s, log_p, reduction="none", log_target=True).sum(-1).mean()

    return run


def naive_ssd(options: Options) -> Run:
    """Return the naive computation: dense maps, the distance of each row by definition, mean over rows and heads."""

    def run(inputs: Inputs) -> Tensor:
        teacher, student = matrices(inputs)
        if options["distance"] == "frobenius":
            return (teacher - student).square().sum(-1).mean()
        lengths = [(side.square().sum(-1) + EPSILON).sqrt() for side in (teacher, student)]
        return (1 - (teacher * student).sum(-1) / (lengths[0] * lengths[1])).mean()

    return run


def mohawk(options: Options) -> Run:
    """Return MOHAWK's matrix orientation (arXiv 2408.10189): |M - A|_F per head, not squared, mean over heads."""

    def run(inputs: Inputs) -> Tensor:
        teacher, student = matrices(inputs)
        return torch.linalg.matrix_norm(student - teacher).mean()

    return run


def compiled_kl(options: Options) -> Run:
    """Return the naive computation under torch.compile."""
    return torch.compile(naive_kl(options))


def compiled_ssd(options: Options) -> Run:
    """Return the naive computation under torch.compile."""
    return torch.compile(naive_ssd(options))


def mixing_of(factors: Inputs) -> Any:
    """Return the mixing of these factors."""
    from xarch_kd.mixing import SoftmaxMixing, SSDMixing

    given: dict[str, Any] = dict(factors)
    return (
        SoftmaxMixing(**given, scale=1 / math.sqrt(given["query"].shape[-1]))
        if "query" in given
        else SSDMixing(**given)
    )


def ours(impl: str, **more: Any) -> Contender:
    """Return the contender of one implementation of `xarch_kd.ops.mixing_distance`."""
    largest: Mapping[str, int] = {"reference": {"time": 2048}, "panels": {"time": 1024}}.get(impl, {})

    def make(options: Options) -> Run:
        from xarch_kd.ops.mixing_distance import mixing_distance

        def run(inputs: Inputs) -> Tensor:
            teacher, student = map(mixing_of, sides(inputs))
            distance = options["distance"]
            return mixing_distance(student, teacher, distance=distance, epsilon=EPSILON, impl=impl, **more).total

        return run

    return Contender(
        make=make, source="xarch_kd", ours=True, needs=("gpu",) if impl == "fused" else (), largest=largest
    )


NAIVE: Final = "PyTorch, eager T×T matching"
COMPILED: Final = "PyTorch, the naive computation compiled"
ATTENTION: Final[dict[str, Contender]] = {
    "naive": Contender(make=naive_kl, source=NAIVE),
    "torch.compile": Contender(make=compiled_kl, source=COMPILED, needs=("compiler",), largest={"time": 2048}),
    **{impl: ours(impl) for impl in ("reference", "streaming", "fused")},
}
SSD: Final[dict[str, Contender]] = {
    "naive": Contender(make=naive_ssd, source=NAIVE),
    "torch.compile": Contender(make=compiled_ssd, source=COMPILED, needs=("compiler",), largest={"time": 2048}),
    "mohawk": Contender(make=mohawk, source="formula of arXiv 2408.10189", truth="mohawk"),
    **{impl: ours(impl) for impl in ("reference", "streaming", "fused", "panels")},
    "sketch": ours("sketch", probes=PROBES, seed=0),
}


def pairs(sizes: Sizes) -> int:
    """Return the number of token pairs of a causal map."""
    return sizes["time"] * (sizes["time"] + 1) // 2


def attention_flops(sizes: Sizes, over: int) -> int:
    """Return the FLOPs of both maps' scores and the gradients of the student's two factors, for `over` pairs."""
    return 8 * sizes["batch"] * sizes["heads"] * over * sizes["width"]


def ssd_flops(sizes: Sizes, over: int) -> int:
    """Return the FLOPs of the teacher's scores, the student's C·B and its two gradients, for `over` pairs."""
    return 2 * sizes["batch"] * over * (sizes["heads"] * sizes["width"] + 3 * sizes["groups"] * sizes["state"])


def pair_flops(sizes: Sizes, over: int) -> int:
    """Return the FLOPs of C·B of both and the student's two gradients, for `over` pairs."""
    return 8 * sizes["batch"] * over * sizes["groups"] * sizes["state"]


TEACHER: Final[dict[str, Input]] = {
    "teacher_query": Input(axes=("batch", "time", "heads", "width")),
    "teacher_key": Input(axes=("batch", "time", "heads", "width")),
}
SOFTMAX_STUDENT: Final[dict[str, Input]] = {
    "query": Input(axes=("batch", "time", "heads", "width"), gradient=True),
    "key": Input(axes=("batch", "time", "heads", "width"), gradient=True),
}
SSD_STUDENT: Final[dict[str, Input]] = {
    "C": Input(axes=("batch", "time", "groups", "state"), deviation=0.25, gradient=True),
    "B": Input(axes=("batch", "time", "groups", "state"), deviation=0.25, gradient=True),
    "dt": Input(axes=("batch", "time", "heads"), transform="positive", gradient=True),
    "log_decay": Input(axes=("batch", "time", "heads"), transform="decay", gradient=True),
}


def attention_kl(time: int, *bounds: Bound) -> Case:
    """Return the case of softmax against softmax, 8 heads of 64."""
    return Case(
        operation="mixing_distance",
        name=f"attention_kl, T={time}",
        group="attention_kl",
        axis="time",
        baseline="naive",
        sizes={"batch": 1, "time": time, "heads": 8, "width": 64},
        quick={"time": 37, "heads": 2, "width": 16},
        proxy={"time": min(time, 1024)},
        inputs=TEACHER | SOFTMAX_STUDENT,
        options={"distance": "kl"},
        contenders=ATTENTION,
        flops=lambda sizes: attention_flops(sizes, pairs(sizes)),
        dense_flops=lambda sizes: attention_flops(sizes, sizes["time"] ** 2),
        bounds=bounds,
    )


def ssd(distance: str, time: int, *bounds: Bound) -> Case:
    """Return the case of softmax against Mamba-2, 8 heads of 64 in one group of state 64."""
    return dataclasses.replace(
        attention_kl(time, *bounds),
        name=f"ssd_{distance}, T={time}",
        group=f"ssd_{distance}",
        sizes={"batch": 1, "time": time, "heads": 8, "width": 64, "groups": 1, "state": 64},
        quick={"time": 37, "heads": 2, "width": 16, "state": 16},
        inputs=TEACHER | SSD_STUDENT,
        options={"distance": distance},
        contenders=SSD,
        flops=lambda sizes: ssd_flops(sizes, pairs(sizes)),
        dense_flops=lambda sizes: ssd_flops(sizes, sizes["time"] ** 2),
    )


def ssd_pair(time: int, *bounds: Bound) -> Case:
    """Return the case of Mamba-2 against Mamba-2: both can be applied in linear time."""
    return dataclasses.replace(
        ssd("frobenius", time, *bounds),
        name=f"ssd_pair, T={time}",
        group="ssd_pair",
        inputs={
            **{f"teacher_{name}": dataclasses.replace(one, gradient=False) for name, one in SSD_STUDENT.items()},
            **SSD_STUDENT,
        },
        flops=lambda sizes: pair_flops(sizes, pairs(sizes)),
        dense_flops=lambda sizes: pair_flops(sizes, sizes["time"] ** 2),
    )


def on_gpu(case: Case, *bounds: Bound) -> Case:
    """Return the case with 32 heads of 128 in bfloat16, for a GPU."""
    wide = {"heads": 32, "width": 128}
    return dataclasses.replace(
        case,
        name=f"{case.name}, gpu",
        group=f"{case.group}, gpu",
        axis=None,
        sizes={**case.sizes, **wide, **({"state": 128} if "state" in case.sizes else {})},
        device="cuda",
        dtype="bfloat16",
        bounds=bounds,
    )


AT_1024: Final = (
    Bound(contender="streaming", measure="time", at_most=0.25),
    Bound(contender="streaming", measure="memory", at_most=0.25),
)
AT_4096: Final = (Bound(contender="streaming", measure="memory", at_most=0.05),)
SKETCH: Final = (Bound(contender="sketch", measure="time", at_most=1.0, against="streaming"),)
CASES: Final[tuple[Case, ...]] = (
    attention_kl(512),
    attention_kl(1024, *AT_1024),
    attention_kl(2048),
    attention_kl(4096, *AT_4096),
    ssd("frobenius", 512),
    ssd("frobenius", 1024, *AT_1024),
    ssd("frobenius", 2048, *SKETCH),
    ssd("frobenius", 4096, *AT_4096, *SKETCH),
    ssd("cosine", 1024),
    ssd_pair(512),
    ssd_pair(1024),
    ssd_pair(2048, *SKETCH),
    ssd_pair(4096, *SKETCH),
    on_gpu(attention_kl(4096), Bound(contender="fused", measure="roofline", at_least=0.4)),
    on_gpu(ssd("frobenius", 4096)),
)
# Softmax attention is applied in linear memory, but no implementation applies it in linear time.
GROWTHS: Final[tuple[Growth, ...]] = (
    Growth(group="ssd_frobenius", contender="sketch", measure="memory", at_most=1.2),
    Growth(group="ssd_pair", contender="sketch", measure="memory", at_most=1.2),
    Growth(group="ssd_pair", contender="sketch", measure="time", at_most=1.2),
)
