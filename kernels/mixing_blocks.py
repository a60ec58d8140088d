"""Tile sizes of the kernels of `mixing_distance` on each back end, such that none spills on sm_90 and gfx942."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from xarch_kd.kernels.tiles import INTERPRETED


class Blocks(NamedTuple):
    """Tile sizes of one kernel: rows and columns of a tile, warps of a program, stages of its loads."""

    rows: int
    columns: int
    warps: int
    stages: int


WORK = ("lse", "values", "row slopes", "column slopes")
# back end -> the widest dtype among the operands of products -> work of the kernel -> largest head dim -> tile sizes.
# "values" reads maps; slopes add a product with a gradient tile, which float16 does as tf32.
BLOCKS: dict[str, dict[str, dict[str, dict[int, Blocks]]]] = {
    "cuda": {
        "bfloat16": {
            "lse": {256: Blocks(64, 64, 8, 2)},
            "values": {128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 2)},
            "row slopes": {128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 2)},
            "column slopes": {128: Blocks(32, 64, 8, 2), 256: Blocks(32, 32, 8, 2)},
        },
        "float16": {
            "lse": {256: Blocks(64, 64, 8, 2)},
            "values": {128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 2)},
            "row slopes": {128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 2)},
            "column slopes": {128: Blocks(32, 64, 8, 2), 256: Blocks(32, 32, 8, 2)},
        },
        "float32": {
            "lse": {256: Blocks(16, 16, 4, 1)},
            "values": {128: Blocks(32, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
            "row slopes": {128: Blocks(32, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
            "column slopes": {128: Blocks(32, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
        },
    },
    "hip": {
        **{
            narrow: {work: {128: Blocks(64, 64, 4, 1), 256: Blocks(32, 32, 4, 1)} for work in WORK}
            for narrow in ("bfloat16", "float16")
        },
        "float32": {work: {128: Blocks(32, 32, 4, 1), 256: Blocks(32, 16, 4, 1)} for work in WORK},
    },
    "interpreter": {
        dtype: {work: {256: Blocks(16, 16, 1, 1)} for work in WORK} for dtype in ("bfloat16", "float16", "float32")
    },
}
# Smallest number of programs of a grid: a few for each multiprocessor of a large GPU.
PROGRAMS = 512


def padded(width: int) -> int:
    """Return the width of a tile that holds `width` columns: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def back_end() -> str:
    """Return the back end that runs the kernels, a key of `BLOCKS`."""
    if INTERPRETED.value:
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def widest_dtype(*tensors: Tensor) -> str:
    """Return the widest dtype of these operands, a key of `BLOCKS`."""
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    return next(dtype for dtype in ("float32", "float16", "bfloat16") if dtype in dtypes)


def blocks(work: str, *tensors: Tensor) -> Blocks:
    """Return the tile sizes of a kernel that does `work` on these operands [..., width]."""
    widest = max(padded(tensor.shape[-1]) for tensor in tensors)
    return blocks_of(back_end(), widest_dtype(*tensors), work, widest)


def blocks_of(where: str, dtype: str, work: str, width: int) -> Blocks:
    """Return the entry of `BLOCKS` that holds `width`."""
    return next(cut for most, cut in BLOCKS[where][dtype][work].items() if most >= width)


def parts(programs: int, heads: int) -> int:
    """Return the number of programs that share the `heads` of a group, so that the grid is not too small.

    `programs` is the size of the grid with one program for all heads of a group.
    """
    count = 1
    while programs * count < PROGRAMS and heads % (count * 2) == 0:
        count *= 2
    return count


def launch(cut: Blocks) -> dict[str, Any]:
    """Return the launch arguments for these tile sizes."""
    return {"BM": cut.rows, "BN": cut.columns, "num_warps": cut.warps, "num_stages": cut.stages}
