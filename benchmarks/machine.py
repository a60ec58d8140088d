"""Roofline of the machine, and the stamp of machine and code in a result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import torch

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGES: Final = ("torch", "triton", "transformers", "liger-kernel", "trl", "numpy")
# Vendors' data sheets, without sparsity: FLOP/s of matrix products by dtype, bytes/s of the memory.
GPUS: Final[dict[str, dict[str, float]]] = {
    "A100-SXM4-80GB": {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12, "bandwidth": 2.039e12},
    "H100 80GB HBM3": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "bandwidth": 3.35e12},
    "H200": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "bandwidth": 4.8e12},
    "MI300X": {"bfloat16": 1307e12, "float16": 1307e12, "float32": 163.4e12, "bandwidth": 5.3e12},
}


class Machine:
    """The roofline of the device: a matrix product and a copy, timed in the same rounds as the contenders."""

    def __init__(self, *, device: str, dtype: str, quick: bool = False) -> None:
        side = 256 if quick else 2048 if device == "cpu" else 8192
        words = 1 << (18 if quick else 25 if device == "cpu" else 28)
        kind = getattr(torch, dtype)
        self.device, self.dtype = device, dtype
        self.left, self.right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        self.product = torch.empty_like(self.left)
        self.origin = torch.ones(words, device=device)
        self.copy = torch.empty_like(self.origin)

    def rates(self) -> dict[str, float]:
        """Return FLOP/s of the matrix product and bytes/s of the copy, read and written."""
        side = self.left.shape[0]
        product = self._timed(lambda: torch.mm(self.left, self.right, out=self.product))
        copy = self._timed(lambda: self.copy.copy_(self.origin))
        return {"flops": 2 * side**3 / product, "bandwidth": 2 * self.origin.numel() * 4 / copy}

    def _timed(self, compute: Any) -> float:
        best = float("inf")
        for _ in range(3):
            if self.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            compute()
            if self.device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best


def roofline(rounds: list[dict[str, float]], *, device: str, dtype: str) -> dict[str, Any]:
    """Return the best rates of all rounds, which shares are relative to, with each round's and a GPU's data sheet."""
    best = {name: max(one[name] for one in rounds) for name in ("flops", "bandwidth")}
    source = "measured: the best matrix product and copy of this run"
    result: dict[str, Any] = {**best, "source": source, "rounds": rounds}
    if device == "cuda":
        name = torch.cuda.get_device_name()
        sheet = next((rates for known, rates in GPUS.items() if known in name), {})
        if dtype in sheet:
            result["data_sheet"] = {"flops": sheet[dtype], "bandwidth": sheet["bandwidth"]}
    return result


def stamp(*, device: str, threads: int) -> dict[str, Any]:
    """Return time, revision, versions and machine of a result, without names of hosts or folders."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name)) is not None},
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "processors": os.cpu_count(),
        "threads": threads,
    }


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Return the model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def revision() -> dict[str, Any]:
    """Return the commit of the checkout, and under `clean` False if anything but results differs from it."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "clean": None}
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"commit": commit, "clean": changed == ""}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
