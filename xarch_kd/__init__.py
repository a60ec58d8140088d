"""Distil a Hugging Face Transformer into any student stack from one mapping file.

Public names load on first use, so that importing the package costs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from xarch_kd.errors import XarchError
from xarch_kd.models.in_place.registration import register_when_loaded

if TYPE_CHECKING:
    from xarch_kd import ops
    from xarch_kd.job.evaluate import evaluate
    from xarch_kd.job.train import train
    from xarch_kd.mapping_file.load import load_mapping
    from xarch_kd.models.conversion.convert import convert
    from xarch_kd.planning.resolve import make_plan as plan
    from xarch_kd.taps.trace import trace
    from xarch_kd.training.aligner import Aligner

__version__ = "0.1.0"

__all__ = [
    "Aligner",
    "XarchError",
    "__version__",
    "convert",
    "evaluate",
    "load_mapping",
    "ops",
    "plan",
    "trace",
    "train",
]

# Public name → the module that holds it and the name it has there (None: the module itself).
_ORIGINS: dict[str, tuple[str, str | None]] = {
    "Aligner": ("xarch_kd.training.aligner", "Aligner"),
    "convert": ("xarch_kd.models.conversion.convert", "convert"),
    "evaluate": ("xarch_kd.job.evaluate", "evaluate"),
    "load_mapping": ("xarch_kd.mapping_file.load", "load_mapping"),
    "ops": ("xarch_kd.ops", None),
    "plan": ("xarch_kd.planning.resolve", "make_plan"),
    "trace": ("xarch_kd.taps.trace", "trace"),
    "train": ("xarch_kd.job.train", "train"),
}


# So that AutoModelForCausalLM loads students that were converted in place.
register_when_loaded()


def __getattr__(name: str) -> object:
    if name not in _ORIGINS:
        raise AttributeError(f"module 'xarch_kd' has no attribute '{name}'")
    module, attribute = _ORIGINS[name]
    loaded = import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
