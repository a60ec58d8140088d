"""Configurations of `mixing_distance` that are compiled without a GPU: each kernel with the tile sizes of `BLOCKS`.

"plain" compares head h with head h; "mixed" has a head map, a window and a softcap.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xarch_kd.kernels.mixing_blocks import blocks_of, padded
from xarch_kd.kernels.mixing_maps import lse_kernel
from xarch_kd.kernels.mixing_softmax import softmax_columns, softmax_rows
from xarch_kd.kernels.mixing_ssd import ssd_columns, ssd_rows, teacher_diagonal
from xarch_kd.kernels.tiles import Specimen

VALUES, SLOPES = {"WRITE_VALUES": True, "WRITE_SLOPES": False}, {"WRITE_VALUES": False, "WRITE_SLOPES": True}
BOTH = {"WRITE_VALUES": True, "WRITE_SLOPES": True}
# label -> the kernel, its work in `BLOCKS`, its constants.
KERNELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "lse": (lse_kernel, "lse", {"SIDE": 2}),
    "kl rows": (softmax_rows, "row slopes", {"KIND": "kl", **BOTH}),
    "kl columns": (softmax_columns, "column slopes", {"KIND": "kl"}),
    "statistics": (softmax_rows, "values", {"KIND": "statistics", **VALUES}),
    "statistics rows": (softmax_rows, "row slopes", {"KIND": "statistics", **SLOPES}),
    "statistics columns": (softmax_columns, "column slopes", {"KIND": "statistics"}),
    "ssd statistics": (ssd_rows, "values", {"WRITE_SLOPES": False}),
    "ssd rows": (ssd_rows, "row slopes", {"WRITE_SLOPES": True}),
    "ssd columns": (ssd_columns, "column slopes", {}),
    "diagonal": (teacher_diagonal, "values", {}),
}
HEAVY = tuple(name for name, (_, work, _) in KERNELS.items() if "slopes" in work)
# dtype, dim of both heads, variant, kernels.
SHIPPED = (
    ("bfloat16", 64, "mixed", HEAVY),
    ("bfloat16", 128, "plain", HEAVY),
    ("bfloat16", 128, "mixed", tuple(KERNELS)),
    ("bfloat16", 256, "mixed", HEAVY),
    ("float16", 128, "mixed", ("kl rows", "kl columns", "ssd rows", "ssd columns")),
    ("float32", 128, "mixed", ("lse", "kl rows", "statistics columns", "ssd rows", "ssd columns")),
)
# A few bytes, on the older GPU alone.
MAY_SPILL = {("ssd statistics", "bfloat16"): ("sm_80",), ("kl rows", "float32"): ("sm_80",)}
POINTERS = {"bfloat16": "*bf16:16", "float16": "*fp16:16", "float32": "*fp32:16"}
TARGETS = {"cuda": ("sm_80", "sm_90"), "hip": ("gfx942",)}


def _type(name: str, dtype: str) -> str:
    """Return the type of a kernel's argument, which follows from its name."""
    if name in ("Q", "K", "QS", "KS", "QT", "KT", "C", "B"):
        return POINTERS[dtype]
    if name in ("COUNT", "INDEX", "VALID_RANGE"):
        return "*i32:16"
    if name.isupper() and name not in ("HS", "HKS", "HT", "HKT", "G"):
        return "*fp32:16"
    if name.startswith(("scale", "cap")):
        return "fp32"
    # A stride; sizes may be odd.
    return "i32:16" if "_" in name and name not in ("key_heads", "heads_each") else "i32"


def _constants(kernel: Any, width: int, mixed: bool) -> dict[str, Any]:
    """Return those constants of the kernel that depend on the shape of the maps."""
    window = 4096 if mixed else 0
    every: dict[str, Any] = {"STATE": width, "MAPPED": mixed, "WINDOW": window, "WINDOW_S": 0, "WINDOW_T": window}
    for side in ("", "_S", "_T"):
        every |= {f"WIDTH{side}": width, f"PADDED{side}": padded(width), f"CAUSAL{side}": True, f"CAPPED{side}": mixed}
    return {name: value for name, value in every.items() if name in kernel.arg_names}


def _specimens() -> Iterator[Specimen]:
    for dtype, width, variant, names in SHIPPED:
        for name in names:
            kernel, work, constants = KERNELS[name]
            for back_end, targets in TARGETS.items():
                cut = blocks_of(back_end, dtype, work, width)
                tile = {"BM": cut.rows, "BN": cut.columns}
                fixed = constants | _constants(kernel, width, variant == "mixed")
                fixed |= {side: size for side, size in tile.items() if side in kernel.arg_names}
                yield Specimen(
                    label=f"{name.replace(' ', '-')}/{dtype}/{width}/{variant}",
                    kernel=kernel,
                    signature={key: _type(key, dtype) for key in kernel.arg_names if key not in fixed},
                    constexprs=fixed,
                    num_warps=cut.warps,
                    num_stages=cut.stages,
                    targets=targets,
                    may_spill=MAY_SPILL.get((name, dtype), ()),
                )


SPECIMENS = tuple(_specimens())
