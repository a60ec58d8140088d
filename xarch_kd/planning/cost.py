"""Estimates of FLOPs, seconds and bytes of a stage, from shapes alone: times to a factor of about 2, bytes to 1.3.

FLOPs. A matrix product of a [tokens, in] tensor with an [out, in] weight is 2 · in · out per token, so a block costs
2 · (its parameters of two or more axes) plus its token mixing: causal softmax attention 2 · T · heads · head_dim
(scores and values, half of the square); Mamba-2 in chunks of Q, 2 · Q · heads · (state + head_dim) inside a chunk and
4 · heads · state · head_dim between chunks; Mamba-1 9 · channels · state. The backward pass costs as much again for
the gradients of activations, down to the lowest block that trains, and as much again for those weights that train.
A match of mixing matrices computes the entries of both, and the gradients of the student's two factors: one and three
causal products of T · heads · dim per token. The streaming token loss computes the student's logits in both passes,
their gradient, and the teacher's logits once.

Seconds. FLOPs over the rate of a matrix product measured on this machine in the dtype in question, times EFFICIENCY,
the share of that rate that whole passes reach: 0.60 to 0.80 was seen on SmolLM2-135M and its hybrid (2 x 256 tokens,
one thread, on a CPU that also did other work). Loading, evaluation and checkpoints are not counted. On a GPU the share
was not measured.

Bytes. Weights, gradients and the two moments of AdamW of what trains and the student itself, all in float32,
the cache if it is in memory, and what the backward pass keeps: per token and block about 8 · dim + 4 · MLP hidden size
numbers, for Mamba-2 also 5 matrices [heads, Q, Q] a chunk (of what autograd saved in SmolLM2's hybrid this is 1.21 with
only the mixers training, 0.87 with everything); a frozen block below everything that trains keeps nothing.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from xarch_kd.mapping_file.schema import Stage
from xarch_kd.planning.mixing_sizes import mamba2_sizes, number_of
from xarch_kd.planning.models import ModelHandle, parameter_count
from xarch_kd.taps.layout import Layout

EFFICIENCY = 0.6
# Interpreter, libraries and their buffers.
PROCESS_BYTES = 500 * 2**20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# How much faster than in float32 whole passes get in half precision, at most.
HALF_GAIN = {"cpu": 2.0, "cuda": 8.0}
# Rows of logits that the streaming token loss holds at once, and how many tensors of that size.
LOGIT_ROWS, LOGIT_TENSORS = 256, 4

# Sides of the square products that are timed, and the seconds that one of them may take.
PRODUCT_SIZES, PRODUCT_SECONDS = (192, 384, 768), 0.03

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Rates:
    """Matrix-product rates in FLOP/s by dtype name, and the device that they were measured on."""

    device: str
    per_second: dict[str, float]

    def seconds(self, flops: float, dtype: str) -> float:
        """Return the time that passes of `flops` take in `dtype`."""
        return flops / (self.per_second[dtype] * EFFICIENCY)

    @property
    def timing_assumptions(self) -> str:
        """Return the assumptions behind the times, in one line."""
        rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in self.per_second.items())
        return (
            f"matrix products measured on this {self.device} ({rates} GFLOP/s), of which whole passes are taken to "
            f"reach {EFFICIENCY:.0%}; expect times within a factor of 2"
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a stage: total `flops`, `seconds`, `peak_bytes` of device memory (of the process on a CPU)."""

    flops: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """Properties of a stage that determine its cost.

    `teacher_blocks` and `student_blocks` are those that run; `mixers_alone` is true if of the student only the mixers
    do; `teacher_passes` and `student_passes` count micro-batches of `rows` times `time` tokens; `mixing_products` are
    FLOPs per token of the losses on mixing matrices. `adapted` are weights with a low-rank adapter, which have
    `adapter_parameters` together.
    """

    stage: Stage
    rows: int
    time: int
    teacher_blocks: int
    teacher_passes: int
    student_blocks: tuple[int, ...]
    mixers_alone: bool
    student_passes: int
    trainable: frozenset[str]
    projector_parameters: int
    cache_bytes: int
    mixing_products: float = 0.0
    adapted: frozenset[str] = frozenset()
    adapter_parameters: int = 0


def measured_rates(device: str, dtypes: Iterable[str]) -> Rates:
    """Return this machine's matrix-product rates in float32 and in each of `dtypes`, measured in about 0.1 s each.

    A process measures each once for a number of threads.
    A half-precision rate counts for at most HALF_GAIN times float32's: beyond that, passes wait for memory.
    """
    threads = torch.get_num_threads()
    single = _product_rate(torch.float32, device, threads)
    rates = {"float32": single}
    for name in sorted(set(dtypes) - {"float32"}, reverse=True):
        # PyTorch's float16 product is slow on many processors, and would not be representative of a GPU.
        is_slow = name == "float16" and device == "cpu"
        measured = single if is_slow else _product_rate(_DTYPES[name], device, threads)
        rates[name] = min(measured, HALF_GAIN[device] * single)
    return Rates(device, rates)


@functools.cache
def _product_rate(dtype: torch.dtype, device: str, threads: int) -> float:
    """Return the rate of the largest square product that is expected to take at most PRODUCT_SECONDS.

    On a CPU it is `threads` times that of one thread, by the time that this thread ran: other processes make threads
    wait for each other, which can take far longer than a product and could make the faster of two dtypes seem slower.
    """
    rate, seconds = 0.0, 0.0
    for size in PRODUCT_SIZES:
        # Each size is 8 times the work of the one before.
        if 8 * seconds > PRODUCT_SECONDS:
            break
        left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        with _one_thread(device):
            seconds = min(_seconds_of_product(left, right) for _ in range(3))
        rate = 2 * size**3 / seconds
    return rate * threads if device == "cpu" else rate


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    clock = time.thread_time if left.device.type == "cpu" else time.perf_counter
    started = clock()
    torch.mm(left, right).sum().item()
    return max(clock() - started, 1e-6)


def stage_cost(work: StageWork, teacher: ModelHandle, student: ModelHandle, rates: Rates) -> Cost:
    """Return what a stage costs; the module's docstring derives it."""
    tokens = work.rows * work.time
    teacher_token = sum(_block_flops(teacher.layout, index, work.time) for index in range(work.teacher_blocks))
    products = 6.0 * (work.projector_parameters + work.adapter_parameters)
    student_token = _student_flops(work, student) + products + work.mixing_products
    if work.stage.tokens is not None:
        # A head and its gradient: logits twice and ∂/∂hidden for the student, ∂/∂weight where it trains.
        head = student.layout.head_weight
        teacher_token += 2.0 * teacher.layout.head_weight.numel()
        student_token += 2.0 * head.numel() * (4 if student.names[id(head)] in work.trainable else 3)
    teacher_flops = teacher_token * tokens * work.teacher_passes
    student_flops = student_token * tokens * work.student_passes
    seconds = rates.seconds(teacher_flops, teacher.dtype) + rates.seconds(student_flops, work.stage.precision)
    return Cost(
        flops=teacher_flops + student_flops, seconds=seconds, peak_bytes=_peak_bytes(work, teacher, student, rates)
    )


def _student_flops(work: StageWork, student: ModelHandle) -> float:
    """Return the FLOPs per token of the student's blocks, forward and backward."""
    layout = student.layout
    forward = {index: _block_flops(layout, index, work.time, work.mixers_alone) for index in work.student_blocks}
    lowest = _lowest_trained(work, student)
    gradients = sum(flops for index, flops in forward.items() if index >= lowest)
    trained = 2.0 * sum(
        parameter.numel()
        for index in forward
        for parameter in _ran(layout, index, work.mixers_alone).parameters()
        if parameter.ndim >= 2 and student.names[id(parameter)] in work.trainable
    )
    again = gradients if work.stage.gradient_checkpointing else 0.0
    return sum(forward.values()) + gradients + trained + again


def _lowest_trained(work: StageWork, student: ModelHandle) -> int:
    """Return the index of the lowest block that needs gradients; with teacher inputs each block is separate."""
    layout, reached = student.layout, work.trainable | work.adapted
    if work.stage.inputs == "teacher" or student.names_of(layout.embedding.parameters()) & work.trainable:
        return 0
    trained = (index for index, block in enumerate(layout.blocks) if student.names_of(block.parameters()) & reached)
    return next(trained, len(layout.blocks))


def _block_flops(layout: Layout, index: int, length: int, mixer_alone: bool = False) -> float:
    matrices = sum(p.numel() for p in _ran(layout, index, mixer_alone).parameters() if p.ndim >= 2)
    return 2.0 * matrices + _mixing_flops(layout, index, length)


def _mixing_flops(layout: Layout, index: int, length: int) -> float:
    config = layout.model.config.get_text_config()
    kind = layout.mixer_kinds[index]
    if kind == "attention":
        heads = number_of(config, "num_attention_heads")
        return 2.0 * length * (heads * number_of(config, "head_dim") or number_of(config, "hidden_size"))
    if kind == "mamba2":
        heads, head_dim, state, chunk = mamba2_sizes(layout.mixers[index])
        return 2.0 * min(chunk, length) * heads * (state + head_dim) + 4.0 * heads * state * head_dim
    return 9.0 * number_of(config, "intermediate_size") * number_of(config, "state_size") if kind == "mamba" else 0.0


def _peak_bytes(work: StageWork, teacher: ModelHandle, student: ModelHandle, rates: Rates) -> int:
    # The student trains in float32, whatever dtype it is saved in.
    student_bytes = parameter_count(student.layout.model) * BYTES["float32"]
    models = parameter_count(teacher.layout.model) * BYTES[teacher.dtype] + student_bytes
    trained = sum(p.numel() for p in student.layout.model.parameters() if student.names[id(p)] in work.trainable)
    trained += work.adapter_parameters
    # Gradient and two moments of what trains; a projector also has its weight.
    training = 3 * trained * BYTES["float32"] + 16 * work.projector_parameters
    # The moving average of what trains, and the best weights, which are kept in main memory.
    copies = int(work.stage.ema is not None)
    if rates.device == "cpu" and work.stage.evaluation is not None and work.stage.evaluation.keep == "best":
        copies += 1
    training += copies * trained * BYTES["float32"]
    lowest = _lowest_trained(work, student)
    kept = [_kept_numbers(student.layout, index, work) for index in work.student_blocks if index >= lowest]
    if work.stage.gradient_checkpointing and kept:
        kept = [max(kept), *(student.layout.dim for _ in kept)]
    logits = 0
    if work.stage.tokens is not None:
        kept.append(student.layout.dim + teacher.layout.dim)
        logits = 4 * LOGIT_TENSORS * LOGIT_ROWS * student.vocabulary
    activations = 4 * work.rows * work.time * int(sum(kept))
    cached = work.cache_bytes if work.stage.cache_place == "memory" else 0
    return PROCESS_BYTES + models + training + activations + logits + cached


def _kept_numbers(layout: Layout, index: int, work: StageWork) -> float:
    """Return the numbers per token that are stored for the backward pass of one block."""
    config = layout.model.config.get_text_config()
    kept = 8.0 * layout.dim
    if layout.mlps is not None and not work.mixers_alone:
        kept += 4.0 * number_of(config, "intermediate_size")
    if layout.mixer_kinds[index] == "mamba2":
        heads, _, _, chunk = mamba2_sizes(layout.mixers[index])
        kept += 5.0 * heads * chunk
    return kept


def _ran(layout: Layout, index: int, mixer_alone: bool) -> nn.Module:
    return layout.mixers[index] if mixer_alone else layout.blocks[index]
