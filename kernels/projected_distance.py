"""Distance of projected students y from teachers t and its gradient, which overwrites y. One program per row.

Two passes over a row, the second from the cache: sums of y², y t, t² and (y - t)² or Huber's; the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xarch_kd.kernels.tiles import INTERPRETED, Specimen

KINDS = ("mse", "squared_error", "huber", "l2", "cosine", "normalised_mse")
# Columns per block. Rows in the interpreter are short, and should still have several blocks.
BLOCK = 64 if INTERPRETED else 2048
WARPS = 4


@triton.jit
def projected_of(ROW, BIAS, columns, inside, BIASED: tl.constexpr):
    """row + bias of some columns, 0 outside."""
    y = tl.load(ROW + columns, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        y += tl.load(BIAS + columns, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def distance_row(
    PROJECTED,  # float32 [rows, width], one row every projected_stride elements
    GRADIENT,  # the same memory in the dtype of the gradient, one row every gradient_stride elements
    TEACHER,  # [rows, width]
    BIAS,  # [width], read if BIASED
    SCALE,  # float32 [rows]: factor of a row's gradient
    DISTANCE,  # float32 [rows]
    projected_stride,
    gradient_stride,
    teacher_stride,
    width,
    epsilon,
    delta,  # |y - t| from which Huber's distance is linear
    KIND: tl.constexpr,
    BIASED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PACKED: tl.constexpr,  # an entry of GRADIENT is narrower than one of PROJECTED
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    PROJECTED += row * projected_stride
    GRADIENT += row * gradient_stride
    TEACHER += row * teacher_stride
    squared = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    length = tl.zeros([BLOCK], tl.float32)
    teacher_length = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < width
        y = projected_of(PROJECTED, BIAS, c, inside, BIASED)
        t = tl.load(TEACHER + c, mask=inside, other=0.0).to(tl.float32)
        if KIND == "cosine":
            product += y * t
            length += y * y
        elif KIND == "huber":
            bounded = tl.minimum(tl.maximum(y - t, -delta), delta)
            squared += bounded * (y - t - 0.5 * bounded)
        elif KIND == "mse" or KIND == "squared_error" or KIND == "l2" or KIND == "normalised_mse":
            squared += (y - t) * (y - t)
        else:
            tl.static_assert(False, "unknown KIND of distance")
        if KIND == "cosine" or KIND == "normalised_mse":
            teacher_length += t * t
    if KIND == "cosine":
        inverse = 1.0 / tl.sqrt(tl.sum(length, 0) + epsilon)
        across = inverse / tl.sqrt(tl.sum(teacher_length, 0) + epsilon)
        cosine = tl.sum(product, 0) * across
        along = cosine * inverse * inverse
        value = 1.0 - cosine
    else:
        if KIND == "mse" or KIND == "huber":
            divisor = width * 1.0
        elif KIND == "normalised_mse":
            divisor = tl.sum(teacher_length, 0) + epsilon
        elif KIND == "squared_error" or KIND == "l2":
            divisor = 1.0
        else:
            tl.static_assert(False, "unknown KIND of distance")
        value = tl.sum(squared, 0) / divisor
        across = 2.0 / divisor
        if KIND == "l2":
            value = tl.sqrt(value)
            # At y = t it is multiplied by 0.
            across = 1.0 / tl.maximum(value, 1e-30)
    tl.store(DISTANCE + row, value)
    if WITH_GRADIENT:
        scale = tl.load(SCALE + row)
        for start in range(0, width, BLOCK):
            c = start + tl.arange(0, BLOCK)
            inside = c < width
            y = projected_of(PROJECTED, BIAS, c, inside, BIASED)
            t = tl.load(TEACHER + c, mask=inside, other=0.0).to(tl.float32)
            if KIND == "cosine":
                gradient = along * y - across * t
            elif KIND == "huber":
                gradient = tl.minimum(tl.maximum(y - t, -delta), delta) / divisor
            elif KIND == "mse" or KIND == "squared_error" or KIND == "l2" or KIND == "normalised_mse":
                gradient = across * (y - t)
            else:
                tl.static_assert(False, "unknown KIND of distance")
            gradient = (gradient * scale).to(GRADIENT.dtype.element_ty)
            if PACKED:
                # This block's entries may overwrite what other threads have not yet loaded.
                tl.debug_barrier()
            tl.store(GRADIENT + c, gradient, mask=inside)


@torch.library.custom_op("xarch_kd::distance_rows", mutates_args=("projected",))
def distance_rows(
    projected: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    distance: str,
    epsilon: float,
    gradient: torch.dtype,
    delta: float = 1.0,
) -> Tensor:
    """Return the distance (float32) of each row of `projected` (+ bias) from the teacher's, both [rows, width].

    Rows have adjacent columns. With `scale` [rows], the gradient of scale * distance overwrites `projected` in the
    dtype `gradient`, which is no wider. `gradient_view` returns it.
    """
    rows, width = projected.shape
    values = projected.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return values
    out = gradient_view(projected, gradient)
    with torch.cuda.device_of(projected):
        distance_row[(rows,)](
            projected,
            out,
            teacher,
            projected if bias is None else bias,
            values if scale is None else scale,
            values,
            projected.stride(0),
            out.stride(0),
            teacher.stride(0),
            width,
            epsilon,
            delta,
            KIND=distance,
            BIASED=bias is not None,
            WITH_GRADIENT=scale is not None,
            PACKED=out.dtype.itemsize < projected.dtype.itemsize,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return values


@distance_rows.register_fake
def _(projected: Tensor, *options: object) -> Tensor:
    return projected.new_empty(projected.shape[0], dtype=torch.float32)


def gradient_view(projected: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient [rows, width] that `distance_rows` wrote into the memory of `projected`."""
    return projected if projected.dtype == dtype else projected.view(dtype)[:, : projected.shape[1]]


def _specimen(kind: str, teacher: str, gradient: str) -> Specimen:
    types = {"PROJECTED": "fp32", "GRADIENT": gradient, "TEACHER": teacher, "BIAS": teacher}
    types |= {"SCALE": "fp32", "DISTANCE": "fp32"}
    signature = {name: f"*{element}:16" for name, element in types.items()}
    signature |= {f"{name}_stride": "i32:16" for name in ("projected", "gradient", "teacher")}
    return Specimen(
        label=f"{kind}/{teacher}-{gradient}",
        kernel=distance_row,
        signature=signature | {"width": "i32:16", "epsilon": "fp32", "delta": "fp32"},
        constexprs={
            "KIND": kind,
            "BIASED": True,
            "WITH_GRADIENT": True,
            "PACKED": gradient != "fp32",
            "BLOCK": BLOCK,
        },
        num_warps=WARPS,
    )


SPECIMENS = (
    *(_specimen(kind, "bf16", "bf16") for kind in KINDS),
    *(_specimen("cosine", element, "fp32") for element in ("fp32", "fp16")),
)
