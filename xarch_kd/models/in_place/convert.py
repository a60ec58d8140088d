"""Students that are the teacher's own class with recurrent mixers in some blocks, where no stock class is exact.

Everything but the replaced attention is the teacher's: norms after sub-blocks, norms of queries and keys, windows, soft
caps, learned positions, parallel residuals. The price is that transformers alone does not know the class. Importing
this package registers the classes with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`, so

    import xarch_kd
    student = AutoModelForCausalLM.from_pretrained(folder)

loads such a student; its config says so under `needs`.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import ConversionError, renamed_arguments
from xarch_kd.models.conversion.bamba import mamba2_fields
from xarch_kd.models.conversion.check import ROWS, TOKENS, logits_tolerance, runnable
from xarch_kd.models.conversion.layer_selection import kept_layers
from xarch_kd.models.conversion.qwen3_5 import delta_fields
from xarch_kd.models.conversion.targets import TARGETS
from xarch_kd.models.conversion.teacher_spec import teacher_facts
from xarch_kd.models.conversion.weights import check_finite
from xarch_kd.models.in_place.attention import attention_sizes
from xarch_kd.models.in_place.classes import CLASSES, MIXERS, InPlaceClasses
from xarch_kd.models.in_place.configs import PREFIX
from xarch_kd.models.in_place.mixers import new_mixers
from xarch_kd.models.in_place.teachers import FAMILIES

NEEDS_PACKAGE = (
    "The student is the teacher's own class with other mixers, which transformers alone does not know: whoever loads "
    "it needs this package, and `import xarch_kd` before."
)
ALL_RECURRENT = (
    "No block keeps its attention, and transformers' cache does not know its length then: such a student generates "
    "only with use_cache=False. Keep at least one attention block if it is to generate."
)


@renamed_arguments(initialisation="init")
def convert_in_place(
    teacher: PreTrainedModel,
    *,
    layers: str | Sequence[int],
    mixer: str = "mamba2",
    init: Literal["attention", "random"] = "attention",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    check: bool = True,
) -> PreTrainedModel:
    """Return a copy of the teacher, of its own class, whose blocks `layers` have a new mixer instead of attention.

    `layers` are indices or words as in `keep.py`, `mixer` is `mamba2` or `gated_delta`. The mixers start from the
    attention they replace, or, seeded, at random. The teacher is not changed and shares no tensor with the student.
    With `check` the class without any mixer is compared with the teacher's. Raises `UsageError` for layers that do not
    fit, `ConversionError` for a teacher that is not in the table; warns if no attention is left.
    """
    if init not in ("attention", "random"):
        raise ConversionError("There is no such init.", asked=init, allowed="attention, random")
    config: Any = in_place_config(teacher.config, layers=layers, mixer=mixer)
    if len(config.replaced_layers) == config.num_hidden_layers:
        warnings.warn(ALL_RECURRENT, UserWarning, stacklevel=2)
    if check:
        check_in_place(teacher)
    places = mixer_places(config)
    kept = {name: value for name, value in teacher.state_dict().items() if not name.startswith(tuple(places.values()))}
    state = _copied(kept, dtype)
    made = new_mixers(teacher, config, seed=seed if init == "random" else None)
    for layer, mixer_state in made.items():
        state |= {f"{places[layer]}{name}": value.to(dtype) for name, value in mixer_state.items()}
    check_finite(state, what="The converted student")
    config.dtype = dtype
    student = runnable(config, state, teacher.device).requires_grad_(True)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def in_place_config(
    teacher: PreTrainedConfig, *, layers: str | Sequence[int], mixer: str = "mamba2"
) -> PreTrainedConfig:
    """Return the config of the student that `convert_in_place` would build; no weights are needed.

    Raises `UsageError` for layers that do not fit, `ConversionError` for a teacher or mixer that is not in the table.
    """
    classes = _classes(teacher)
    make: Any = classes.config
    if mixer not in MIXERS:
        raise ConversionError("There is no conversion to this mixer.", asked=mixer, allowed=", ".join(MIXERS))
    sizes = attention_sizes(teacher)
    count: int = teacher.num_hidden_layers  # type: ignore[attr-defined]  # a field of every family's config
    kept = kept_layers(count, replace=layers)
    settings = mamba2_fields(sizes) if mixer == "mamba2" else delta_fields(sizes)
    # The recipes of the first weights are for silu, whatever the teacher's MLP has.
    settings |= {"hidden_act": "silu", "rms_norm_eps": sizes.epsilon}
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = {field.name for field in dataclasses.fields(teacher)} - common
    # Not a field of every class whose attention reads it.
    names |= {"head_dim"} if getattr(teacher, "head_dim", None) is not None else set()
    return make(
        **{name: copy.deepcopy(getattr(teacher, name)) for name in sorted(names)},
        architectures=[classes.model.__name__],
        replaced_layers=[index for index in range(count) if index not in kept],
        mixer=mixer,
        mixer_settings=settings,
    )


def mixer_places(config: PreTrainedConfig) -> dict[int, str]:
    """Return what the names of the weights of each new mixer begin with, by block."""
    values: Any = config
    name = config.model_type.removeprefix(PREFIX)
    family, prefix = FAMILIES[name], CLASSES[name].model.base_model_prefix
    return {layer: f"{prefix}.{family.blocks}.{layer}.{family.mixer}." for layer in values.replaced_layers}


def check_in_place(teacher: PreTrainedModel) -> float:
    """Return the largest difference of logits between a teacher and its in-place class that keeps all attention.

    Both borrow the teacher's tensors. Raises `ConversionError` above `logits_tolerance`; it is 0 where the same
    operations run twice alike.
    """
    state = teacher.state_dict()
    config: Any = in_place_config(teacher.config, layers=())
    twin = runnable(type(teacher.config).from_dict(teacher.config.to_dict()), state, teacher.device)
    student = runnable(config, state, teacher.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (ROWS, TOKENS), generator=generator).to(teacher.device)
    with torch.no_grad():
        expected = twin(tokens, use_cache=False).logits
        difference = float((expected - student(tokens, use_cache=False).logits).abs().max())
    tolerance = logits_tolerance(float(expected.abs().max()), config.num_hidden_layers, expected.dtype)
    if not difference <= tolerance:
        raise ConversionError(
            "The conversion is not exact: with all attention kept, the student's logits are not the teacher's.",
            asked=f"{teacher.config.model_type} to {config.model_type}",
            found=f"largest difference {difference:.3g}",
            allowed=f"{tolerance:.3g}",
            fix="report it with the teacher's config.json: a field of it is not carried over",
        )
    return difference


def _classes(teacher: PreTrainedConfig) -> InPlaceClasses:
    """Return the classes for a teacher, or raise `ConversionError` with the reason why there are none."""
    if getattr(teacher, "use_bidirectional_attention", False) or getattr(teacher, "add_cross_attention", False):
        raise ConversionError(
            "The teacher attends to more than the past of its own text, which a recurrent mixer cannot.",
            asked="use_bidirectional_attention or add_cross_attention: true",
            allowed="a causal language model",
        )
    if teacher.model_type in CLASSES:
        return CLASSES[teacher.model_type]
    if teacher.model_type.startswith(PREFIX):
        reason, fix = "it has new mixers already", "convert the first teacher, with all the layers that shall change"
    elif teacher.model_type == "gemma3":
        reason, fix = "it reads images too", "load its text part alone: Gemma3ForCausalLM, type gemma3_text"
    elif (held := _stock(teacher)) is not None:
        reason, fix = "a stock class holds it, and a student of that needs no package to be loaded", held
    else:
        reason = "where its attention is, and how it is masked, is not in the table of families"
        fix = "build a fresh student (student: {config: FOLDER}) and align it, which needs no conversion"
    raise ConversionError(
        f"A teacher of type {teacher.model_type} is not converted in place: {reason}.",
        asked=f"model_type: {teacher.model_type}",
        allowed=", ".join(CLASSES),
        fix=fix,
    )


def _stock(teacher: PreTrainedConfig) -> str | None:
    """Return what to write for the first stock class that holds a teacher, or None if there is none."""
    try:
        facts = teacher_facts(teacher)
    except ConversionError:
        return None
    able = (target for target in TARGETS.values() if target.unsupported_reason(facts) is None)
    return next((f"mixer: {target.mixer}, target: {target.name}" for target in able), None)


def _copied(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return copies; what shares memory before does so after, as tied weights."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for value in state.values():
        copies.setdefault((value.data_ptr(), value.shape), value.to(dtype, copy=True))
    return {name: copies[value.data_ptr(), value.shape] for name, value in state.items()}
