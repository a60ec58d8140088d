"""Peak memory of a computation over the memory held before it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def peak_over(compute: Callable[[], object], device: str) -> tuple[int, str]:
    """Return the peak bytes of `compute` over those held before it, and the method of measurement.

    On a GPU, by the allocator. On the CPU, by the resident set: its high-water mark is reset first if the kernel allows
    it, else the growth of `ru_maxrss` is used, which an earlier peak hides, so that it must be the first call.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "allocator"
    _give_back()
    if peak_can_be_set_back():
        before = _resident("VmRSS")
        compute()
        return max(0, _resident("VmHWM") - before), "resident set, peak set back"
    before = _largest()
    compute()
    return max(0, _largest() - before), "ru_maxrss, growth in the first call"


def peak_can_be_set_back() -> bool:
    """Reset the high-water mark of the resident set to its current size and return True if that is allowed."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def _give_back() -> None:
    """Return freed pages of the C library to the system, so that they are neither in the base nor reused unseen."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _resident(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _largest() -> int:
    import resource

    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024
