"""Students that are the teacher's own class with recurrent mixers in some blocks, where no stock class is exact.

Everything but the replaced attention is the teacher's: norms after sub-blocks, norms of queries and keys, windows, soft
caps, learned positions, parallel residuals. But transformers alone cannot load such a class. Importing
this package registers the classes with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`, so

    import xarch_kd
    student = AutoModelForCausalLM.from_pretrained(folder)

loads such a student; the field `needs` of its config names this package.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import ConversionError, check_table
from xarch_kd.models.conversion.base import Conversion, Selection
from xarch_kd.models.conversion.check import runnable
from xarch_kd.models.conversion.layer_selection import kept_layers
from xarch_kd.models.conversion.recipes import RECIPES
from xarch_kd.models.conversion.targets import TARGETS
from xarch_kd.models.conversion.teacher_spec import teacher_spec
from xarch_kd.models.in_place.attention import attention_sizes
from xarch_kd.models.in_place.classes import CLASSES, MIXER_CLASSES, InPlaceClasses
from xarch_kd.models.in_place.configs import PREFIX
from xarch_kd.models.in_place.mixers import IN_PLACE_NAMES, new_mixers
from xarch_kd.models.in_place.teachers import ALL_TEACHERS, IN_PLACE_TEACHERS, WINDOW

check_table("names of in-place mixers", IN_PLACE_NAMES, MIXER_CLASSES)
NEEDS_PACKAGE = (
    "The student is the teacher's own class with other mixers, which transformers alone cannot load: install "
    "this package and `import xarch_kd` before loading it."
)
ALL_RECURRENT = (
    "No block keeps its attention, and transformers' cache then has no length: such a student generates only "
    "with use_cache=False. Keep at least one attention block if it has to generate."
)


def plan_in_place(
    teacher: PreTrainedConfig,
    *,
    mixer: str = "mamba2",
    keep_attention: Selection = None,
    replace: Selection = None,
    window: int | None = None,
    sinks: int = 0,
) -> InPlaceConversion:
    """Return the conversion within the teacher's own class; arguments as in `convert`.

    Raises UsageError for a selection that does not fit, ConversionError for a teacher or mixer that is not in the
    tables.
    """
    classes = _classes(teacher, mixer)
    if mixer not in (*MIXER_CLASSES, WINDOW):
        raise ConversionError(
            "There is no conversion to this mixer.", asked=mixer, allowed=", ".join((*MIXER_CLASSES, WINDOW))
        )
    count: int = teacher.num_hidden_layers  # type: ignore[attr-defined]  # a field of every family's config
    kept = kept_layers(count, keep_attention=keep_attention, replace=replace)
    replaced = [index for index in range(count) if index not in kept]
    settings: dict[str, Any] | None = None
    if mixer == WINDOW:
        settings = _window_settings(teacher, replaced, window, sinks)
    return InPlaceConversion(
        teacher_config=teacher,
        config=_student_config(teacher, classes, mixer, replaced, settings),
        kept=kept,
        warnings=(NEEDS_PACKAGE,) if kept or mixer == WINDOW else (NEEDS_PACKAGE, ALL_RECURRENT),
        mixer=mixer,
    )


@dataclass(frozen=True, kw_only=True)
class InPlaceConversion(Conversion):
    """Conversion within the teacher's own class, exact up to the new mixers."""

    all_recurrent: ClassVar[str] = ALL_RECURRENT

    mixer: str

    def state(self, teacher: PreTrainedModel, dtype: torch.dtype, *, seed: int | None) -> dict[str, Tensor]:
        """See `Conversion`. A window has the weights of its attention."""
        if self.mixer == WINDOW:
            if seed is not None:
                raise ConversionError(
                    "Attention through a window keeps the teacher's weights.",
                    asked="init: random",
                    fix="init: attention",
                )
            return _copied(teacher.state_dict(), dtype)
        places = mixer_places(self.config)
        old = tuple(places.values())
        state = _copied(
            {name: value for name, value in teacher.state_dict().items() if not name.startswith(old)}, dtype
        )
        for layer, made in new_mixers(teacher, self.config, seed=seed).items():
            state |= {f"{places[layer]}{name}": value.to(dtype) for name, value in made.items()}
        return state

    def all_attention_pair(self, teacher: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
        """See `Conversion`. Both are in the teacher's dtype; the same operations run in both, so logits are equal."""
        state = teacher.state_dict()
        twin = type(teacher.config).from_dict(teacher.config.to_dict())
        config = _student_config(
            teacher.config,
            _classes(teacher.config, self.mixer),
            self.mixer,
            [],
            self.config.mixer_settings,  # type: ignore[attr-defined]  # of every in-place config
        )
        return runnable(twin, state, teacher.device), runnable(config, state, teacher.device)


def _student_config(
    teacher: PreTrainedConfig,
    classes: InPlaceClasses,
    mixer: str,
    replaced: list[int],
    settings: dict[str, Any] | None,
) -> PreTrainedConfig:
    if settings is None:
        sizes = attention_sizes(teacher)
        # The recipes of the first weights are for silu, whatever the teacher's MLP has.
        settings = {**RECIPES[mixer].fields(sizes), "hidden_act": "silu", "rms_norm_eps": sizes.epsilon}
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = {field.name for field in dataclasses.fields(teacher)} - common
    # Not a field of every class whose attention reads it.
    names |= {"head_dim"} if getattr(teacher, "head_dim", None) is not None else set()
    make: Any = classes.config
    return make(
        **{name: copy.deepcopy(getattr(teacher, name)) for name in sorted(names)},
        architectures=[classes.model.__name__],
        replaced_layers=replaced,
        mixer=mixer,
        mixer_settings=settings,
    )


def _window_settings(teacher: PreTrainedConfig, replaced: list[int], window: int | None, sinks: int) -> dict[str, Any]:
    """Return the settings of a window. Raises `ConversionError` without one, and for a block that has its own."""
    if window is None or window < 1 or sinks < 0:
        raise ConversionError(
            "A window needs its length: the number of last tokens that a token attends to, itself included.",
            asked=f"window: {window}, sinks: {sinks}",
            allowed="window: at least 1, sinks: at least 0",
            fix="window: 512 and sinks: 4",
        )
    own = getattr(teacher, "sliding_window", None)
    types = getattr(teacher, "layer_types", None) or ["full_attention" if own is None else "sliding_attention"]
    windowed = [index for index in replaced if types[index % len(types)] != "full_attention"]
    if windowed:
        raise ConversionError(
            "The teacher's attention has a window of its own in these blocks, so they stay as they are.",
            asked=f"mixer: window in blocks {', '.join(map(str, windowed))}",
            found=f"sliding_window: {own}",
            allowed="blocks with full attention",
        )
    return {"window": window, "sinks": sinks}


def mixer_places(config: PreTrainedConfig) -> dict[int, str]:
    """Return the prefix of the weights of each new mixer, by block."""
    values: Any = config
    name = config.model_type.removeprefix(PREFIX)
    family, prefix = ALL_TEACHERS[name], CLASSES[name].model.base_model_prefix
    return {layer: f"{prefix}.{family.blocks}.{layer}.{family.mixer}." for layer in values.replaced_layers}


def _classes(teacher: PreTrainedConfig, mixer: str) -> InPlaceClasses:
    """Return the classes for a teacher. Raises `ConversionError` with the reason if there are none."""
    if getattr(teacher, "use_bidirectional_attention", False) or getattr(teacher, "add_cross_attention", False):
        raise ConversionError(
            "The teacher attends to more than the past of its own text, which a recurrent mixer cannot.",
            asked="use_bidirectional_attention or add_cross_attention: true",
            allowed="a causal language model",
        )
    held = ALL_TEACHERS if mixer == WINDOW else IN_PLACE_TEACHERS
    if teacher.model_type in held:
        return CLASSES[teacher.model_type]
    if teacher.model_type.startswith(PREFIX):
        reason, fix = "it has new mixers already", "convert the first teacher, with all the layers that shall change"
    elif teacher.model_type == "gemma3":
        reason, fix = "it reads images too", "load its text part alone: Gemma3ForCausalLM, type gemma3_text"
    elif mixer != WINDOW and (stock := _stock(teacher)) is not None:
        reason, fix = "a stock class holds it, and a student of that needs no package to be loaded", stock
    else:
        reason = "where its attention is, and how it is masked, is not in the table of families"
        fix = "build a fresh student (student: {config: FOLDER}) and align it, which needs no conversion"
    raise ConversionError(
        f"A teacher of type {teacher.model_type} is not converted in place: {reason}.",
        asked=f"model_type: {teacher.model_type}",
        allowed=", ".join(held),
        fix=fix,
    )


def _stock(teacher: PreTrainedConfig) -> str | None:
    """Return the options that select the first stock class that holds a teacher, or None."""
    try:
        spec = teacher_spec(teacher)
    except ConversionError:
        return None
    able = (target for target in TARGETS.values() if target.unsupported_reason(spec) is None)
    return next((f"mixer: {target.mixer}, target: {target.name}" for target in able), None)


def _copied(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return copies in which tied weights share memory as before."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for value in state.values():
        copies.setdefault((value.data_ptr(), value.shape), value.to(dtype, copy=True))
    return {name: copies[value.data_ptr(), value.shape] for name, value in state.items()}
