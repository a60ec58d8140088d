"""Counting of the reads of device scalars that a piece of code makes, on a machine without a device."""

from __future__ import annotations

import traceback
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten
# Operations whose result a device has to hand over before the host can go on.
READS: Final = frozenset(
    {
        aten._local_scalar_dense.default,
        aten.nonzero.default,
        aten.equal.default,
        aten.masked_select.default,
        aten._unique2.default,
        aten.bincount.default,
        aten.repeat_interleave.Tensor,
    }
)


class CountingReads(TorchDispatchMode):
    """Collects the reads made inside it, each as the frames (file name, function) that led to it, innermost first.

    A machine without a device runs the same operations on the host, where they are counted. Reads whose frames hold one
    of `ignored` are left out: code that reads only tensors of the host.
    """

    def __init__(self, ignored: frozenset[tuple[str, str]] = frozenset()) -> None:
        super().__init__()
        self.ignored = ignored
        self.found: list[list[tuple[str, str]]] = []
        self._lists = _CountingLists(self)

    def __enter__(self) -> CountingReads:
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS or (function is aten.index.Tensor and _by_boolean(args[1])):
            self.add()
        return function(*args, **(kwargs or {}))

    def add(self) -> None:
        """Take in a read of the code that is running."""
        codes = (frame.f_code for frame, _ in traceback.walk_stack(None))
        frames = [(_short(code.co_filename), code.co_name) for code in codes]
        if not self.ignored & set(frames):
            packages = tuple(frame for frame in frames if frame[0].startswith(("xarch_kd/", "transformers/")))
            self.found.append([frame for frame in packages if frame[0] != "xarch_kd/testing/reads.py"])


class _CountingLists(TorchFunctionMode):
    """Counts `tolist`, which reads a whole tensor without an operation of its own."""

    def __init__(self, reads: CountingReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.tolist:
            self.reads.add()
        return function(*args, **(kwargs or {}))


def _by_boolean(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _short(path: str) -> str:
    for package in ("xarch_kd/", "transformers/", "torch/"):
        if f"/{package}" in path:
            return package + path.rpartition(f"/{package}")[2]
    return path
