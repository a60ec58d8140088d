"""Shared parts of all kernels: products, softcaps, masked loads and finite sums of exponentials.

Everything here is `triton.jit` code for tiles in registers, except `Specimen`, a shipped configuration of a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl

# The interpreter multiplies the raw bits of bfloat16; its operands are widened, which changes no value.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

TARGETS = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One shipped configuration of a kernel, complete enough to compile it without a GPU.

    `signature` gives the type of every argument that is no constexpr, in the kernel's order: `"*bf16"`, `"i32"`,
    `"i64"`, `"fp32"`; a suffix `":16"` means that the pointer (in bytes) or the integer is a multiple of 16. `label` is
    unique in its file. `targets` are the back ends it ships for, `may_spill` those on which a register may spill.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    targets: tuple[str, ...] = TARGETS
    may_spill: tuple[str, ...] = ()


@triton.jit
def dot(a, b, accumulator=None):
    """a b (+ accumulator) in float32; float32 operands are never rounded to tf32."""
    if INTERPRETED:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), acc=accumulator, input_precision="ieee")
    else:
        product = tl.dot(a, b, acc=accumulator, input_precision="ieee")
    return product


@triton.jit
def tanh(x):
    """tanh(x) from exp(-2|x|), which cannot overflow."""
    decayed = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decayed) / (1.0 + decayed)
    return tl.where(x < 0, -size, size)


@triton.jit
def softcap(z, cap, CAPPED: tl.constexpr):
    """cap tanh(z / cap), or z itself when CAPPED is false."""
    if CAPPED:
        z = cap * tanh(z / cap)
    return z


@triton.jit
def softcap_slope(capped, cap, CAPPED: tl.constexpr):
    """The softcap's derivative from its own result: 1 - (capped / cap)², or 1 when CAPPED is false."""
    slope = 1.0
    if CAPPED:
        share = capped / cap
        slope = 1.0 - share * share
    return slope


@triton.jit
def finite_or_zero(maximum):
    """A running maximum to subtract: 0 instead of -inf, so that exp(-inf - maximum) is 0 and not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def load_tile(base, rows, columns, row_stride, row_count, column_count):
    """base[rows, columns] (adjacent columns) with 64-bit offsets, 0 from row_count and column_count on."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, values, rows, columns, row_stride, row_count, column_count):
    """Write values to base[rows, columns] in its own dtype, within row_count and column_count."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    place = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(place, values.to(base.dtype.element_ty), mask=inside)
