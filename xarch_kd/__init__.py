"""Distil a Hugging Face Transformer into any student stack from one mapping file.

Public names load on first use, so that importing the package costs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from xarch_kd.errors import XarchError
from xarch_kd.models.in_place.registration import register_when_loaded as _register_when_loaded

if TYPE_CHECKING:
    from xarch_kd import layer_mapping, losses, ops, plots, projectors
    from xarch_kd.job.evaluate import evaluate
    from xarch_kd.job.run import Run
    from xarch_kd.job.train import train
    from xarch_kd.layer_mapping.layer_map import LayerMap
    from xarch_kd.mapping_file.load import load_mapping
    from xarch_kd.mapping_file.schema import MappingFile
    from xarch_kd.mixing.base import Mixing
    from xarch_kd.models.conversion.convert import convert
    from xarch_kd.planning.plan import Plan
    from xarch_kd.planning.resolve import make_plan as plan
    from xarch_kd.taps.trace import Trace, trace
    from xarch_kd.training.aligner import Aligner

__version__ = "0.1.0"

__all__ = [
    "Aligner",
    "LayerMap",
    "MappingFile",
    "Mixing",
    "Plan",
    "Run",
    "Trace",
    "XarchError",
    "__version__",
    "convert",
    "evaluate",
    "layer_mapping",
    "load_mapping",
    "losses",
    "ops",
    "plan",
    "plots",
    "projectors",
    "trace",
    "train",
]

# Public name → the module that holds it and the name it has there (None: the module itself).
_ORIGINS: dict[str, tuple[str, str | None]] = {
    "Aligner": ("xarch_kd.training.aligner", "Aligner"),
    "LayerMap": ("xarch_kd.layer_mapping.layer_map", "LayerMap"),
    "MappingFile": ("xarch_kd.mapping_file.schema", "MappingFile"),
    "Mixing": ("xarch_kd.mixing.base", "Mixing"),
    "Plan": ("xarch_kd.planning.plan", "Plan"),
    "Run": ("xarch_kd.job.run", "Run"),
    "Trace": ("xarch_kd.taps.trace", "Trace"),
    "convert": ("xarch_kd.models.conversion.convert", "convert"),
    "evaluate": ("xarch_kd.job.evaluate", "evaluate"),
    "layer_mapping": ("xarch_kd.layer_mapping", None),
    "load_mapping": ("xarch_kd.mapping_file.load", "load_mapping"),
    "losses": ("xarch_kd.losses", None),
    "ops": ("xarch_kd.ops", None),
    "plan": ("xarch_kd.planning.resolve", "make_plan"),
    "plots": ("xarch_kd.plots", None),
    "projectors": ("xarch_kd.projectors", None),
    "trace": ("xarch_kd.taps.trace", "trace"),
    "train": ("xarch_kd.job.train", "train"),
}


# So that AutoModelForCausalLM loads students that were converted in place.
_register_when_loaded()


def __getattr__(name: str) -> object:
    if name not in _ORIGINS:
        from xarch_kd.errors import suggest

        raise AttributeError(f"module 'xarch_kd' has no attribute '{name}'.{suggest(name, __all__)}")
    module, attribute = _ORIGINS[name]
    loaded = _import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
