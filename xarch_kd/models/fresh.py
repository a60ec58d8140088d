"""Configs of fresh students from a mapping file: keys are checked, sizes must fit, tokens are the teacher's."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from xarch_kd.errors import ModelError, suggest
from xarch_kd.models.loading.load import meta_model
from xarch_kd.models.loading.reference import CODE_KEYS

# Fields in which a student must agree with its teacher; the teacher's values are the defaults.
SHARED_WITH_TEACHER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")

# Larger depths are typing errors, and would be built block by block before any other check.
DEEPEST = 1024

_OTHERS_BUSINESS = {
    "dtype": "the student trains in float32 and is saved in student.dtype",
    "torch_dtype": "the student trains in float32 and is saved in student.dtype",
    "architectures": "the class follows from model_type",
    "transformers_version": "it is written when the student is saved",
    "quantization_config": "a fresh student is not quantized",
    "attn_implementation": "it is chosen when the model runs",
    "code_revision": "code that comes with a checkpoint is never run",
    **dict.fromkeys(CODE_KEYS, "code that comes with a checkpoint is never run"),
}

# Keys of expansion, heads, width of a head and groups of mixers whose heads have to fill the expanded width.
_EXPANDED = {
    "mamba2": ("expand", "num_heads", "head_dim", "n_groups"),
    "bamba": ("mamba_expand", "mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    "granitemoehybrid": ("mamba_expand", "mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    "zamba2": ("mamba_expand", "n_mamba_heads", "mamba_headdim", "mamba_ngroups"),
}


@dataclasses.dataclass(frozen=True)
class ConfigProblem:
    """Problem of a config: its key (None for the whole config) and a message."""

    key: str | None
    message: str


class FreshConfigError(ModelError):
    """Config from which no student can be built, with all its `problems`."""

    def __init__(self, problems: list[ConfigProblem]) -> None:
        self.problems = tuple(problems)
        texts = (f"{problem.key}: {problem.message}" if problem.key else problem.message for problem in problems)
        super().__init__("The config of the student does not hold. " + " ".join(texts))


def fresh_config(values: Mapping[str, Any], teacher: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of `values` (with a `model_type`), for a student of `teacher`.

    The vocabulary's size and the ids of special tokens are the teacher's unless given. Head and embedding are tied
    unless `tie_word_embeddings: false` is given, whatever the class's default: with the vocabulary of a large teacher
    they are most of a small student. Raises `FreshConfigError` with every problem: keys that the class does not have,
    which transformers would keep and ignore; values of another kind; sizes that do not fit one another.
    """
    model_type = _model_type(values)
    fields = config_fields(model_type)
    problems = [problem for key, value in values.items() for problem in _key_problems(key, value, fields, model_type)]
    reported = {problem.key for problem in problems}
    given = {key: _as_field(value, fields.get(_own(model_type, key))) for key, value in values.items()}
    given = {key: value for key, value in given.items() if key != "model_type" and key not in reported}
    if not problems:
        problems += _size_problems(model_type, given, fields)
    config = _built({**_inherited(model_type, given, fields, teacher), **given}, problems, values)
    if config is not None:
        problems += _token_problems(config, values)
    if config is None or problems:
        raise FreshConfigError(problems)
    return config


def config_fields(model_type: str) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a model type's config class, without those that are not about its architecture."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name: field for field in dataclasses.fields(CONFIG_MAPPING[model_type]) if field.name not in common}


def _model_type(values: Mapping[str, Any]) -> str:
    model_type = values.get("model_type")
    if model_type is None:
        raise FreshConfigError([ConfigProblem(None, "it needs a model_type, e.g. model_type: mamba2")])
    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    message = ""
    if not isinstance(model_type, str) or model_type not in known:
        message = f"transformers has no causal language model of this type, '{model_type}'."
        message += suggest(str(model_type), known)
    elif CONFIG_MAPPING[model_type].sub_configs:
        text = f"{model_type}_text"
        message = f"a {model_type} is made of several models; a student is one."
        message += f" Write model_type: {text}" if text in known else ""
    if message:
        raise FreshConfigError([ConfigProblem("model_type", message)])
    return str(model_type)


def _own(model_type: str, key: str) -> str:
    """Return the class's own name of a key: GPT-2 calls `hidden_size` `n_embd`."""
    return CONFIG_MAPPING[model_type].attribute_map.get(key, key)


def _key_problems(
    key: str, value: Any, fields: Mapping[str, dataclasses.Field[Any]], model_type: str
) -> Iterator[ConfigProblem]:
    field = fields.get(_own(model_type, key))
    if key == "model_type":
        return
    if key in _OTHERS_BUSINESS or key.startswith("_"):
        reason = _OTHERS_BUSINESS.get(key, "keys that begin with _ are the library's own")
        yield ConfigProblem(key, f"this cannot be set in a mapping file: {reason}")
    elif field is None:
        names = [*fields, *CONFIG_MAPPING[model_type].attribute_map]
        hint = suggest(key, names) or f" It has {', '.join(sorted(fields))}"
        yield ConfigProblem(key, f"a {model_type} has no such key.{hint}")
    elif isinstance(value, bool) and "bool" not in _kind(field):
        yield ConfigProblem(key, f"must be {_words(field)}, found {str(value).lower()}")
    elif isinstance(value, int) and abs(value) >= 2**31:
        yield ConfigProblem(key, "no model has such a size")
    elif _own(model_type, key) == _own(model_type, "num_hidden_layers") and isinstance(value, int):
        if not 1 <= value <= DEEPEST:
            yield ConfigProblem(key, f"must be at least 1 and at most {DEEPEST}, found {value}")
    else:
        yield from (
            ConfigProblem(key, f"{inner} cannot be set in a mapping file: {_OTHERS_BUSINESS[inner]}")
            for inner in _inner_keys(value)
            if inner in _OTHERS_BUSINESS
        )


def _inner_keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for item in items:
        yield from _inner_keys(item)


def _kind(field: dataclasses.Field[Any]) -> str:
    kind = field.type
    return kind.__name__ if isinstance(kind, type) else re.sub(r"\w+\.", "", str(kind))


def _words(field: dataclasses.Field[Any]) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    return words.get(_kind(field), _kind(field))


def _as_field(value: Any, field: dataclasses.Field[Any] | None) -> Any:
    """Return a value as configs take it: lists as lists, whole numbers as floats where nothing else fits."""
    if isinstance(value, list | tuple):
        return [_as_field(item, field) for item in value]
    if isinstance(value, Mapping):
        return {key: _as_field(item, None) for key, item in value.items()}
    is_float = field is not None and "float" in _kind(field) and "int" not in _kind(field)
    return float(value) if is_float and type(value) is int else value


def _inherited(
    model_type: str,
    given: Mapping[str, Any],
    fields: Mapping[str, dataclasses.Field[Any]],
    teacher: PreTrainedConfig,
) -> dict[str, Any]:
    source = teacher.get_text_config()
    values = {name: getattr(source, name, None) for name in SHARED_WITH_TEACHER if name in fields}
    ends = values.get("eos_token_id")
    if isinstance(ends, list) and "list" not in _kind(fields["eos_token_id"]):
        values["eos_token_id"] = ends[0]
    if "tie_word_embeddings" in fields:
        values["tie_word_embeddings"] = True
    return {"model_type": model_type, **{name: value for name, value in values.items() if name not in given}}


def _token_problems(config: PreTrainedConfig, written: Mapping[str, Any]) -> Iterator[ConfigProblem]:
    for name in SHARED_WITH_TEACHER[1:]:
        value = getattr(config, name, None)
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not 0 <= token < config.vocab_size:
                key = name if name in written else "vocab_size"
                yield ConfigProblem(key, f"the {name} is {token}, outside a vocabulary of {config.vocab_size}")


def _size_problems(
    model_type: str, given: Mapping[str, Any], fields: Mapping[str, dataclasses.Field[Any]]
) -> list[ConfigProblem]:
    """Return the problems of sizes that do not fit one another, each with what would fit."""

    def size(key: str) -> Any:
        own = _own(model_type, key)
        value = given.get(key, given.get(own))
        return fields[own].default if value is None and own in fields else value

    problems = []
    if model_type in _EXPANDED:
        problems += _expanded(_EXPANDED[model_type], given, size)
    width, heads, groups = (size(key) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if _positive(heads, groups) and heads % groups:
        fits = _listed(number for number in range(1, heads + 1) if heads % number == 0)
        problems.append(
            ConfigProblem(
                _first_given(given, "num_key_value_heads", "num_attention_heads"),
                f"{heads} attention heads are not shared evenly by {groups} key and value heads. "
                f"What fits: num_key_value_heads of {fits}",
            )
        )
    if _positive(width, heads) and not _positive(size("head_dim")) and width % heads:
        fits = _listed(number for number in range(1, 65) if width % number == 0)
        key = _first_given(given, _own(model_type, "num_attention_heads"), "num_attention_heads", "hidden_size")
        problems.append(
            ConfigProblem(key, f"a width of {width} is not made of {heads} equal attention heads. What fits: {fits}")
        )
    return problems


def _expanded(keys: tuple[str, str, str, str], given: Mapping[str, Any], size: Any) -> Iterator[ConfigProblem]:
    expand, heads, head_dim, groups = keys
    width, factor, count, each = (size(key) for key in ("hidden_size", expand, heads, head_dim))
    if not _positive(width, factor, count):
        return
    inner = int(width * factor)
    if each == "auto":
        each = inner // count
    if _positive(each) and count * each != inner:
        if inner % each == 0:
            fits = f"{heads}: {inner // each} with {head_dim} {each}"
        elif inner % count == 0:
            fits = f"{head_dim}: {inner // count} with {heads} {count}"
        else:
            fits = f"{heads}: {inner // math.gcd(inner, 64)} with {head_dim}: {math.gcd(inner, 64)}"
        yield ConfigProblem(
            _first_given(given, heads, head_dim, expand, "hidden_size"),
            f"hidden_size {width} × {expand} {factor} is {inner}, but {heads} {count} × {head_dim} {each} is "
            f"{count * each}. What fits: {fits}",
        )
    elif _positive(size(groups)) and count % size(groups):
        yield ConfigProblem(
            _first_given(given, groups, heads),
            f"{heads} {count} is not a multiple of {groups} {size(groups)}. What fits: "
            f"{groups}: {math.gcd(count, size(groups))}",
        )


def _positive(*values: Any) -> bool:
    return all(isinstance(value, int | float) and value > 0 for value in values)


def _first_given(given: Mapping[str, Any], *keys: str) -> str | None:
    return next((key for key in keys if key in given), None)


def _listed(numbers: Iterator[int]) -> str:
    return ", ".join(map(str, numbers))


def _built(
    arguments: dict[str, Any], problems: list[ConfigProblem], written: Mapping[str, Any]
) -> PreTrainedConfig | None:
    """Return the config after building its model on the meta device; append a problem for each refused value."""
    model_type = str(arguments.pop("model_type"))
    kind = CONFIG_MAPPING[model_type]
    while True:
        try:
            config = kind(**arguments)
            if not problems:
                meta_model(config)
            return config
        except StrictDataclassFieldValidationError as error:
            match = re.search(r"field '(\w+)'", str(error))
            key = None if match is None else _written(match[1], arguments, model_type)
            if key is None:
                problems.append(ConfigProblem(None, _last_line(error)))
                return None
            problems.append(
                ConfigProblem(
                    key if key in written else None,
                    f"must be {_words(config_fields(model_type)[_own(model_type, key)])}, found {arguments.pop(key)!r}",
                )
            )
        except StrictDataclassError as error:
            problems += [] if problems else [ConfigProblem(None, _last_line(error))]
            return None
        except Exception as error:
            # Classes do not check their sizes, and the errors that follow have no common type.
            error = (
                error.__cause__ if isinstance(error, ModelError) and isinstance(error.__cause__, Exception) else error
            )
            reason = f"{type(error).__name__}: {_last_line(error)}"
            problems.append(ConfigProblem(None, f"no {model_type} can be built with these values: {reason}"))
            return None


def _written(field: str, arguments: Mapping[str, Any], model_type: str) -> str | None:
    return next((key for key in arguments if _own(model_type, key) == field), None)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ") if lines else ""
