"""Configs of a teacher's own classes with recurrent mixers in some blocks, registered with transformers.

No modeling module is imported here: transformers imports its automatic classes in the middle of importing its modeling
modules, and each of those would then be only partly initialized. The model classes are registered by stand-ins, which
import `classes.py` when a model is built.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from xarch_kd.models.in_place.teachers import ALL_TEACHERS, WINDOW, InPlaceTeacher

PREFIX = "xarch_kd_"
RECURRENT = "linear_attention"
NEEDS = "the package xarch_kd: import xarch_kd before this model is loaded"


class InPlaceConfig:
    """A teacher's config, with the blocks that have a mixer instead of attention.

    `replaced_layers` are their indices, `mixer` is `mamba2`, `gated_delta` or `window`, and `mixer_settings` are fields
    of the config of the class that the mixer is from (Bamba, Qwen3.5), or `window` and `sinks`. `needs` names the
    package that loads such a model.
    """

    family: InPlaceTeacher
    replaced_layers: list[int]
    mixer: str
    mixer_settings: dict[str, Any]
    num_hidden_layers: int

    def __post_init__(self, **kwargs: Any) -> None:
        """Read the fields that the teacher's class does not have, and set the types of recurrent layers."""
        # Not a field of every class, and derived where it is none.
        kwargs.pop("layer_types", None)
        self.replaced_layers = sorted(kwargs.pop("replaced_layers", []))
        self.mixer = kwargs.pop("mixer", "mamba2")
        self.mixer_settings = dict(kwargs.pop("mixer_settings", {}))
        self.needs = kwargs.pop("needs", NEEDS)
        super().__post_init__(**kwargs)  # type: ignore[misc]  # of the teacher's config class, which follows
        windowed = getattr(self, "sliding_window", None) is not None
        count = self.num_hidden_layers
        types = getattr(self, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"] * count
        recurrent = () if self.mixer == WINDOW else self.replaced_layers
        self.layer_types = [RECURRENT if index in recurrent else types[index] for index in range(count)]
        rope = getattr(self, "rope_parameters", None) or {}
        if any(isinstance(value, dict) for value in rope.values()):
            # A class with rotary tables by type of layer makes one for each type that there is.
            rope.setdefault(RECURRENT, {"rope_type": "default", "rope_theta": 10000.0})


def _config_class(model_type: str, family: InPlaceTeacher) -> type[PreTrainedConfig]:
    """Return a new config class `InPlace…` of the type `xarch_kd_…`."""
    teacher = getattr(transformers, family.config)
    documented = f"{family.config} of a model with recurrent mixers in some of its blocks."
    attributes = {"__doc__": documented, "__module__": __name__, "family": family, "model_type": PREFIX + model_type}
    made: type[PreTrainedConfig] = type(f"InPlace{family.config}", (InPlaceConfig, teacher), attributes)
    return made


CONFIGS: dict[str, type[PreTrainedConfig]] = {
    name: _config_class(name, family) for name, family in ALL_TEACHERS.items()
}


class _Deferred:
    """Stand-in for a model class in transformers' tables: it imports the class when a model is built."""

    config_class: type[PreTrainedConfig]
    own_name: str

    @classmethod
    def _own(cls) -> type[PreTrainedModel]:
        found: type[PreTrainedModel] = getattr(import_module("xarch_kd.models.in_place.classes"), cls.own_name)
        return found

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load a model as the class itself does."""
        return cls._own().from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return cls._own()._from_config(*args, **kwargs)


def register() -> None:
    """Register configs and stand-ins with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`; idempotent."""
    for name, config in CONFIGS.items():
        family = ALL_TEACHERS[name]
        AutoConfig.register(PREFIX + name, config, exist_ok=True)
        for auto, own_name in ((AutoModel, family.base), (AutoModelForCausalLM, family.model)):
            stand_in = type(own_name, (_Deferred,), {"config_class": config, "own_name": f"InPlace{own_name}"})
            auto.register(config, stand_in, exist_ok=True)


def __getattr__(name: str) -> type:
    """Return a config class by its name, as pickle looks it up."""
    for config in CONFIGS.values():
        if config.__name__ == name:
            return config
    raise AttributeError(f"module {__name__} has no attribute {name}")


register()
