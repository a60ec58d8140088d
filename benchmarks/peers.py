"""Optional requirements of contenders, and loaders of other packages' losses."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


def gpu(device: str) -> str | None:
    """Return the reason why Triton kernels cannot run, or None."""
    if device != "cuda":
        return "needs a GPU"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def compiler(device: str) -> str | None:
    """Return the reason why torch.compile cannot run, or None: it needs a C++ compiler on the CPU, Triton on a GPU."""
    if device == "cuda":
        return gpu(device)
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    return None if any(name and shutil.which(name) for name in names) else "torch.compile needs a C++ compiler"


def liger(device: str) -> str | None:
    """Return the reason why Liger's losses cannot be measured, or None."""
    return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def trl_chunked(device: str) -> str | None:
    """Return the reason why TRL's chunked divergence cannot be measured, or None."""
    if importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    try:
        load_trl_chunked()
    except (ImportError, AttributeError) as error:
        return f"this release of trl has no chunked divergence that loads: {type(error).__name__}: {error}"
    return None


def trl_dense(device: str) -> str | None:
    """Return the reason why TRL's dense GKD loss, a method of a trainer, cannot be measured, or None."""
    if importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    try:
        load_trl_dense()
    except (ImportError, RuntimeError, AttributeError) as error:
        return f"trl's GKD trainer does not load: {type(error).__name__}: {error}"
    return None


REQUIREMENTS: dict[str, Callable[[str], str | None]] = {
    "gpu": gpu,
    "compiler": compiler,
    "liger": liger,
    "trl chunked": trl_chunked,
    "trl dense": trl_dense,
}


def load_trl_chunked() -> Any:
    """Return TRL's ChunkedDivergenceFunction without importing its trainers and their requirements.

    Its module imports one name from them, a context that gathers ZeRO-3 shards and does nothing without DeepSpeed; it
    gets a context that does nothing.
    """
    with _trainers_left_out():
        return importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction


def load_trl_dense() -> Callable[..., Any]:
    """Return the loss of TRL's GKD trainer on logits. Its module warns that it may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss


@contextlib.contextmanager
def _trainers_left_out() -> Iterator[None]:
    """Replace `trl.trainer.utils` by a module with one function, unless it is loaded already."""
    trainers, utilities = ModuleType("trl.trainer"), ModuleType("trl.trainer.utils")
    utilities.__dict__["maybe_gather_lm_head_ctx"] = lambda *parameters: contextlib.nullcontext()
    replaced = {"trl.trainer": trainers, "trl.trainer.utils": utilities}
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update({name: module for name, module in replaced.items() if before[name] is None})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
