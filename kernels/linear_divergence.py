"""Divergence of two rows of logits and its gradient, which overwrites the student's logits. One program per row.

Letters: z logits, p = softmax(z of the teacher / temperature), q the student's, x = log p - log q, f' = ∂F/∂q of a
divergence Σ F. Passes over a row: sums of exponentials; sums of F and q f'; the gradient q (f' - Σ q f'). Forward KL,
whose Σ q f' is -1, skips the second pass and sums F in the third. If q is nearly one-hot, the two terms of the gradient
cancel, so f' is first centered at the student's likeliest entry; forward KL, alpha and Rényi use R = q f', because
their f' overflows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xarch_kd.kernels.tiles import INTERPRETED, Specimen, finite_or_zero, softcap, softcap_slope

KINDS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "alpha",
    "renyi",
)
# Columns per block and warps per program. Rows in the interpreter are short, and should still have several blocks.
BLOCK = 128 if INTERPRETED else 2048
WARPS = 8
# Rows of logits start at multiples of this many elements, so that loads and stores are whole vectors.
ALIGNMENT = 64


@triton.jit
def expm1(x):
    """e^x - 1, for x up to 60, within a few roundings, also near 0."""
    series = 1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0))
    series = 1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * series)))
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(u):
    """log(1 + u) within a few roundings, also near 0, by the series of 2 artanh(u / (2 + u))."""
    near = tl.abs(u) < 0.3
    ratio = tl.where(near, u / (2.0 + u), 0.0)
    square = ratio * ratio
    series = 1.0 + square * (1.0 / 3.0 + square * (0.2 + square * (1.0 / 7.0 + square / 9.0)))
    return tl.where(near, 2.0 * ratio * series, tl.log(1.0 + u))


@triton.jit
def log_student_over_mixture(x, teacher_share):
    """log(q / (s p + (1 - s) q)) = -log(1 + s (e^x - 1)), which stays accurate if p and q are close."""
    beyond = tl.where(x > 60.0, x - 60.0, 0.0)
    return -beyond - log1p(teacher_share * expm1(x - beyond))


@triton.jit
def summand(log_q, log_p, share, KIND: tl.constexpr):
    """F of each entry, and f' or, for forward KL, alpha and Rényi, R without its constant factor.

    Products with a p or q of 0 are 0, which is their limit; NaN stays NaN.
    """
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    x = log_p - log_q
    if KIND == "forward_kl":
        value = tl.where(p == 0.0, 0.0, p * x)
        slope = -p
    elif KIND == "reverse_kl":
        value = tl.where(q == 0.0, 0.0, -q * x)
        slope = -x
    elif KIND == "total_variation":
        value = 0.5 * tl.abs(p - q)
        slope = tl.where(x < 0.0, 0.5, tl.where(x > 0.0, -0.5, 0.0))
    elif KIND == "jsd":
        r = log_student_over_mixture(x, share)
        value = share * tl.where(p == 0.0, 0.0, p * (x + r)) + (1.0 - share) * tl.where(q == 0.0, 0.0, q * r)
        slope = (1.0 - share) * r
    elif KIND == "skew_forward_kl":
        teacher_over_mixture = x + log_student_over_mixture(x, share)
        value = tl.where(p == 0.0, 0.0, p * teacher_over_mixture)
        slope = (share - 1.0) * tl.exp(teacher_over_mixture)
    elif KIND == "skew_reverse_kl":
        r = log_student_over_mixture(x, 1.0 - share)
        value = tl.where(q == 0.0, 0.0, q * r)
        slope = r - share * tl.exp(r)
    elif KIND == "alpha" or KIND == "renyi":
        overlap = tl.exp(share * log_p + (1.0 - share) * log_q)
        value = overlap - share * p - (1.0 - share) * q
        slope = -overlap
    else:
        tl.static_assert(False, "unknown KIND of divergence")
    return value, slope


@triton.jit
def logits_of(ROW, BIAS, columns, width, vocabulary, scale, cap, BIASED: tl.constexpr, CAPPED: tl.constexpr):
    """softcap(scale * (row + bias)) of some columns, 0 in padded ones, whatever they hold."""
    z = tl.load(ROW + columns, mask=columns < width, other=0.0).to(tl.float32)
    z = tl.where(columns < vocabulary, z, 0.0)
    if BIASED:
        z += tl.load(BIAS + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
    return softcap(z * scale, cap, CAPPED)


@triton.jit
def divergence_row(
    STUDENT,  # [rows, student_width] raw logits, one row every student_stride elements
    GRADIENT,  # the same memory in the dtype of the gradient, one row every gradient_stride elements
    TEACHER,  # [rows, teacher_width]
    STUDENT_BIAS,  # [vocabulary], read if S_BIASED (S: student, T: teacher)
    TEACHER_BIAS,
    LABELS,  # int64 [rows], read if LABELLED
    SCALE,  # float32 [rows]: factor of a row's gradient
    DIVERGENCE,  # float32 [rows]
    CROSS_ENTROPY,  # float32 [rows], written if LABELLED
    STEEPEST,  # float32 [rows], written if WITH_GRADIENT: the largest |∂D/∂(z / temperature)|
    student_stride,
    gradient_stride,
    teacher_stride,
    student_width,
    teacher_width,
    vocabulary,
    share,
    factor,
    inverse_temperature,
    divergence_weight,
    cross_entropy_weight,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    KIND: tl.constexpr,
    SOFTENED: tl.constexpr,  # the temperature is not 1
    LABELLED: tl.constexpr,
    S_BIASED: tl.constexpr,
    T_BIASED: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PACKED: tl.constexpr,  # an entry of GRADIENT is narrower than one of STUDENT
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    STUDENT += row * student_stride
    GRADIENT += row * gradient_stride
    TEACHER += row * teacher_stride
    R_FORM: tl.constexpr = KIND == "forward_kl" or KIND == "alpha" or KIND == "renyi"
    label = 0
    label_logit = 0.0
    if LABELLED:
        # Read before anything is overwritten: the reductions below keep the program's threads together.
        label = tl.load(LABELS + row)
        label_logit = tl.load(STUDENT + label).to(tl.float32)
        if S_BIASED:
            label_logit += tl.load(STUDENT_BIAS + label).to(tl.float32)
        label_logit = softcap(label_logit * student_scale, student_cap, S_CAPPED)

    # Every lane has its own running maximum and sum; they are combined once, after the loop.
    student_max = tl.full([BLOCK], float("-inf"), tl.float32)
    student_sum = tl.zeros([BLOCK], tl.float32)
    plain_sum = tl.zeros([BLOCK], tl.float32)
    teacher_max = tl.full([BLOCK], float("-inf"), tl.float32)
    teacher_sum = tl.zeros([BLOCK], tl.float32)
    teacher_there = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < vocabulary
        zs = logits_of(
            STUDENT, STUDENT_BIAS, v, student_width, vocabulary, student_scale, student_cap, S_BIASED, S_CAPPED
        )
        zt = logits_of(
            TEACHER, TEACHER_BIAS, v, teacher_width, vocabulary, teacher_scale, teacher_cap, T_BIASED, T_CAPPED
        )
        zs = tl.where(inside, zs, float("-inf"))
        zt = tl.where(inside, zt, float("-inf")) * inverse_temperature
        teacher_there = tl.where(zs > student_max, zt, teacher_there)
        largest = tl.maximum(student_max, zs)
        subtracted = finite_or_zero(largest)
        old = student_max - subtracted
        new = zs - subtracted
        student_sum = student_sum * tl.exp(old * inverse_temperature) + tl.exp(new * inverse_temperature)
        if LABELLED and SOFTENED:
            plain_sum = plain_sum * tl.exp(old) + tl.exp(new)
        student_max = largest
        largest = tl.maximum(teacher_max, zt)
        subtracted = finite_or_zero(largest)
        teacher_sum = teacher_sum * tl.exp(teacher_max - subtracted) + tl.exp(zt - subtracted)
        teacher_max = largest
    top = tl.max(student_max, 0)
    teacher_top = tl.max(teacher_max, 0)
    student_sum = tl.sum(student_sum * tl.exp((student_max - top) * inverse_temperature), 0)
    student_lse = top * inverse_temperature + tl.log(student_sum)
    teacher_lse = teacher_top + tl.log(tl.sum(teacher_sum * tl.exp(teacher_max - teacher_top), 0))
    if LABELLED:
        plain_lse = student_lse
        if SOFTENED:
            plain_lse = top + tl.log(tl.sum(plain_sum * tl.exp(student_max - top), 0))
        tl.store(CROSS_ENTROPY + row, plain_lse - label_logit)

    centre = 0.0
    if not R_FORM:
        # Several lanes may hold the maximum; any of their entries is a valid centre.
        at_top = tl.max(tl.where(student_max == top, teacher_there, float("-inf")), 0)
        _, centre = summand(top * inverse_temperature - student_lse, at_top - teacher_lse, share, KIND)

    value_sum = tl.zeros([BLOCK], tl.float32)
    slope_sum = tl.zeros([BLOCK], tl.float32)
    if KIND != "forward_kl" or not WITH_GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            v = start + tl.arange(0, BLOCK)
            inside = v < vocabulary
            zs = logits_of(
                STUDENT, STUDENT_BIAS, v, student_width, vocabulary, student_scale, student_cap, S_BIASED, S_CAPPED
            )
            zt = logits_of(
                TEACHER, TEACHER_BIAS, v, teacher_width, vocabulary, teacher_scale, teacher_cap, T_BIASED, T_CAPPED
            )
            log_q = zs * inverse_temperature - student_lse
            value, slope = summand(log_q, zt * inverse_temperature - teacher_lse, share, KIND)
            value_sum += tl.where(inside, value, 0.0)
            if not R_FORM:
                q = tl.exp(log_q)
                slope = tl.where(q == 0.0, 0.0, q * (slope - centre))
            slope_sum += tl.where(inside, slope, 0.0)
    mean_slope = tl.sum(slope_sum, 0)
    row_factor = factor
    if KIND == "forward_kl":
        mean_slope = -1.0
    if KIND == "alpha":
        row_factor = factor / share
    if KIND == "renyi":
        row_factor = -factor / mean_slope

    if WITH_GRADIENT:
        scale = tl.load(SCALE + row)
        slope_scale = scale * divergence_weight * inverse_temperature * row_factor
        cross_scale = scale * cross_entropy_weight
        steepest = tl.zeros([BLOCK], tl.float32)
        for start in range(0, student_width, BLOCK):
            v = start + tl.arange(0, BLOCK)
            inside = v < vocabulary
            zs = logits_of(
                STUDENT, STUDENT_BIAS, v, student_width, vocabulary, student_scale, student_cap, S_BIASED, S_CAPPED
            )
            zt = logits_of(
                TEACHER, TEACHER_BIAS, v, teacher_width, vocabulary, teacher_scale, teacher_cap, T_BIASED, T_CAPPED
            )
            log_q = zs * inverse_temperature - student_lse
            value, slope = summand(log_q, zt * inverse_temperature - teacher_lse, share, KIND)
            q = tl.exp(log_q)
            if KIND == "forward_kl":
                value_sum += tl.where(inside, value, 0.0)
            gradient = slope - q * mean_slope
            if not R_FORM:
                gradient = tl.where(q == 0.0, 0.0, q * (slope - centre - mean_slope))
            gradient = tl.where(inside, gradient, 0.0)
            steepest = tl.maximum(steepest, tl.abs(gradient))
            gradient *= slope_scale
            if LABELLED:
                gradient += cross_scale * (tl.exp(zs - plain_lse) - tl.where(v == label, 1.0, 0.0))
            gradient *= softcap_slope(zs, student_cap, S_CAPPED) * student_scale
            gradient = tl.where(inside, gradient, 0.0).to(GRADIENT.dtype.element_ty)
            if PACKED:
                # This block's entries may overwrite what other threads have not yet loaded.
                tl.debug_barrier()
            tl.store(GRADIENT + v, gradient, mask=v < student_width)
        tl.store(STEEPEST + row, tl.max(steepest, 0) * tl.abs(row_factor))
    divergence = tl.sum(value_sum, 0)
    if KIND == "alpha":
        divergence = divergence / (share * (share - 1.0))
    if KIND == "renyi":
        # The logarithm of the sum of overlaps: near 1 from its difference to 1, near 0 from the sum itself.
        overlap = -mean_slope
        small = overlap < 0.5
        logarithm = tl.where(small, tl.log(overlap), log1p(tl.where(small, 0.0, divergence)))
        divergence = logarithm / (share - 1.0)
    tl.store(DIVERGENCE + row, divergence * factor)


@torch.library.custom_op("xarch_kd::divergence_rows", mutates_args=("student",))
def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    vocabulary: int,
    kind: str,
    share: float,
    factor: float,
    temperature: float,
    divergence_weight: float,
    cross_entropy_weight: float,
    student_scale: float,
    teacher_scale: float,
    student_cap: float,
    teacher_cap: float,
    gradient: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence D, the cross-entropy and the largest |∂D/∂(z / temperature)| of each row, in float32.

    The second is empty without labels, the third without a `gradient`.

    `student` and `teacher` are [rows, width] with adjacent columns, of which the first `vocabulary` are the products of
    hidden states and heads; logits are softcap(scale * (product + bias)), and a cap of 0 means no softcap. With a
    `gradient` dtype, no wider than the student's, the gradient of scale * (divergence_weight * D + cross_entropy_weight
    * CE) with respect to the products overwrites the student's products, and is 0 in columns from `vocabulary` on.
    `gradient_view` returns it.
    """
    rows = student.shape[0]
    divergence, cross_entropy, steepest = _values(student, labels, gradient)
    if rows == 0:
        return divergence, cross_entropy, steepest
    out = student if gradient is None else gradient_view(student, gradient)
    with torch.cuda.device_of(student):
        divergence_row[(rows,)](
            student,
            out,
            teacher,
            student if student_bias is None else student_bias,
            teacher if teacher_bias is None else teacher_bias,
            divergence if labels is None else labels,
            scale,
            divergence,
            divergence if labels is None else cross_entropy,
            divergence if gradient is None else steepest,
            student.stride(0),
            out.stride(0),
            teacher.stride(0),
            student.shape[1],
            teacher.shape[1],
            vocabulary,
            share,
            factor,
            1.0 / temperature,
            divergence_weight,
            cross_entropy_weight,
            student_scale,
            teacher_scale,
            student_cap,
            teacher_cap,
            KIND=kind,
            SOFTENED=temperature != 1.0,
            LABELLED=labels is not None,
            S_BIASED=student_bias is not None,
            T_BIASED=teacher_bias is not None,
            S_CAPPED=student_cap > 0,
            T_CAPPED=teacher_cap > 0,
            WITH_GRADIENT=gradient is not None,
            PACKED=out.dtype.itemsize < student.dtype.itemsize,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return divergence, cross_entropy, steepest


def _values(student: Tensor, labels: Tensor | None, gradient: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = student.shape[0]
    sizes = (rows, 0 if labels is None else rows, 0 if gradient is None else rows)
    divergence, cross_entropy, steepest = (student.new_empty(size, dtype=torch.float32) for size in sizes)
    return divergence, cross_entropy, steepest


@divergence_rows.register_fake
def _(
    student: Tensor, teacher: Tensor, scale: Tensor, labels: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _values(student, labels, options[-1])


def gradient_view(student: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient [rows, width] that `divergence_rows` wrote into the memory of `student`."""
    return student if student.dtype == dtype else student.view(dtype)[:, : student.shape[1]]


# (dtype of the student's products, of its gradient), for the dtypes of products and of operands.
_PAIRS = (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"))


def _specimen(kind: str, logits: str, gradient: str, full: bool) -> Specimen:
    """Return a kernel with every option on (`full`), or with the divergence alone."""
    operand = "fp32" if gradient == "fp32" else gradient
    types = {"STUDENT": logits, "GRADIENT": gradient, "TEACHER": logits, "LABELS": "i64"}
    types |= {"STUDENT_BIAS": operand, "TEACHER_BIAS": operand}
    types |= {name: "fp32" for name in ("SCALE", "DIVERGENCE", "CROSS_ENTROPY", "STEEPEST")}
    signature = {name: f"*{element}:16" for name, element in types.items()}
    signature |= {f"{name}_stride": "i32:16" for name in ("student", "gradient", "teacher")}
    signature |= {"student_width": "i32:16", "teacher_width": "i32:16", "vocabulary": "i32"}
    scalars = ("share", "factor", "inverse_temperature", "divergence_weight", "cross_entropy_weight")
    scalars += ("student_scale", "teacher_scale", "student_cap", "teacher_cap")
    flags = ("SOFTENED", "LABELLED", "S_BIASED", "T_BIASED", "S_CAPPED", "T_CAPPED")
    return Specimen(
        label=f"{kind}/{logits}-{gradient}/{'full' if full else 'plain'}",
        kernel=divergence_row,
        signature=signature | dict.fromkeys(scalars, "fp32"),
        constexprs={
            "KIND": kind,
            **dict.fromkeys(flags, full),
            "WITH_GRADIENT": True,
            "PACKED": logits != gradient,
            "BLOCK": BLOCK,
        },
        num_warps=WARPS,
        # Two registers: ptxas stops at 80 registers so that three programs fit.
        may_spill=("sm_80",) if kind in ("alpha", "renyi") else (),
    )


# The dtype of a gradient hardly changes a kernel: every kind in one pair of dtypes, two kinds in all pairs.
SPECIMENS = (
    *(_specimen(kind, "fp32", "bf16", True) for kind in KINDS),
    *(_specimen(kind, *pair, True) for kind in ("forward_kl", "jsd") for pair in _PAIRS if pair != ("fp32", "bf16")),
    *(_specimen("forward_kl", *pair, False) for pair in (("fp32", "bf16"), ("bf16", "bf16"))),
)
