"""Model config of a GGUF file: everything that its metadata and tensors ask for is carried, or refused by name.

transformers reads the weights. Its own reading of the metadata passes over position scaling, head sizes and biases, so
that for the architectures of `PLAIN` the config is made here.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from xarch_kd.errors import ModelError
from xarch_kd.models.loading.gguf_header import GgufHeader, read_gguf_header

# Architectures whose config is made here, with the config field that turns on each kind of bias (None: always there).
PLAIN: Final[Mapping[str, Mapping[str, str | None]]] = {
    "llama": {"attn": "attention_bias", "ffn": "mlp_bias"},
    "qwen2": {"attn": None},
    "qwen3": {"attn": "attention_bias"},
}
# Of the file's tensors; layers are `blk.N.` before them.
_TENSORS: Final = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)
_NORMS: Final = {"qwen3": ("attn_q_norm", "attn_k_norm")}
_BIASES: Final = {"attn": ("attn_q", "attn_k", "attn_v", "attn_output"), "ffn": ("ffn_gate", "ffn_up", "ffn_down")}
ROPE_FREQUENCIES: Final = "rope_freqs.weight"

# Metadata that says nothing about what the model computes.
_INERT: Final = frozenset({"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.type"})
# Metadata that changes nothing at these values.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "use_parallel_residual": (False,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
# Keys that alter what every layer computes, in any architecture.
_ALTERING: Final = re.compile(r"rope\.scal|sliding_window|softcapping|(^|[._])scale$|logit_scale|clamp_kqv|alibi")


def gguf_config(path: Path) -> PreTrainedConfig:
    """Return the config of a GGUF file; no weights are read.

    Raises `ModelError` naming a metadata key or tensor that the model's class has no place for. Warns of keys whose
    meaning is not known.
    """
    header = read_gguf_header(path)
    if header.architecture not in PLAIN:
        return _foreign_config(header)
    # llama.cpp writes Mistral models as llama, whose class they equal but for the window, which is refused below.
    model_type = header.architecture
    own, names = header.own(), GGUF_CONFIG_MAPPING[model_type]
    values: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in header.tensors}
    for key, value in header.metadata.items():
        # Beside the architecture's own keys these are its name and the numbers of special tokens.
        prefix, _, rest = key.partition(".")
        name = GGUF_CONFIG_MAPPING.get(prefix, {}).get(rest)
        if name is not None:
            values[name] = value
    if "vocab_size" not in values and "tokenizer.ggml.tokens" in header.metadata:
        values["vocab_size"] = header.metadata["tokenizer.ggml.tokens"]
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    values["model_type"] = model_type
    _set_head_dim(header, own, values)
    values |= _biases(header, model_type)
    carried = {"attention.key_length", "attention.value_length", "rope.dimension_count", *names}
    scaling = _rope_scaling(header, own, values)
    if scaling is not None:
        values["rope_parameters"] = scaling | {"rope_theta": values.pop("rope_theta", 10000.0)}
    _check_keys(header, {key: value for key, value in own.items() if key not in carried})
    _check_tensors(header, model_type, values)
    return CONFIG_MAPPING[model_type].from_dict(values)


def _set_head_dim(header: GgufHeader, own: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Carry the size of heads. Raises `ModelError` where keys, values and rotated dimensions differ."""
    if header.architecture == "llama" and "attention.head_count_kv" not in own:
        # transformers leaves the rotary order of queries and keys as it is then, which is silently wrong.
        raise ModelError(
            f"{header.path} has no llama.attention.head_count_kv, without which transformers reads queries and keys in "
            "the wrong order.",
            fix="write the file again with that key, or use the original checkpoint in safetensors",
        )
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or not isinstance(values["num_key_value_heads"], int):
        raise ModelError(
            f"{header.path} has no single number of heads and hidden size.",
            found=f"attention.head_count: {heads}, attention.head_count_kv: {values['num_key_value_heads']}",
        )
    default = hidden // heads
    key = own.get("attention.key_length", default)
    sizes = {
        "attention.key_length": key,
        "attention.value_length": own.get("attention.value_length", key),
        "rope.dimension_count": own.get("rope.dimension_count", key),
    }
    if len(set(sizes.values())) > 1:
        raise ModelError(
            f"{header.path} has heads whose keys, values and rotated dimensions differ in size, which the class "
            f"'{values['model_type']}' has no place for.",
            found=", ".join(f"{name}: {size}" for name, size in sizes.items()),
        )
    if key != default or "head_dim" in values or values["model_type"] == "qwen3":
        values["head_dim"] = key


def _biases(header: GgufHeader, model_type: str) -> dict[str, bool]:
    """Return the config fields that turn on the biases that the file holds."""
    found = {}
    for group, field in PLAIN[model_type].items():
        names = {f"{part}.bias" for part in _BIASES[group]}
        if field is not None and any(name.partition(".")[2].partition(".")[2] in names for name in header.tensors):
            found[field] = True
    return found


def _rope_scaling(header: GgufHeader, own: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `rope_parameters` of a file but the base, None for plain rotary positions."""
    kind = own.get("rope.scaling.type", "linear" if "rope.scale_linear" in own else "none")
    if kind not in _SCALINGS:
        raise ModelError(
            f"{header.path} scales rotary positions in a way that is not carried.",
            found=f"{header.architecture}.rope.scaling.type: {kind}",
            allowed=", ".join(_SCALINGS),
        )
    scaling = _SCALINGS[kind](own)
    if ROPE_FREQUENCIES not in header.tensors:
        return scaling
    divisors = header.floats(ROPE_FREQUENCIES)
    if all(divisor == 1.0 for divisor in divisors):
        return scaling
    if scaling is not None:
        raise ModelError(f"{header.path} scales rotary positions twice.", found=f"{kind} and {ROPE_FREQUENCIES}")
    return _llama3(header, divisors, float(values.get("rope_theta", 10000.0)))


def _linear(own: Mapping[str, Any]) -> dict[str, Any] | None:
    factor = float(own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0)))
    return None if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}


def _yarn(own: Mapping[str, Any]) -> dict[str, Any] | None:
    factor = float(own.get("rope.scaling.factor", 1.0))
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    original = own.get("rope.scaling.original_context_length", own.get("context_length"))
    if original is not None:
        found["original_max_position_embeddings"] = int(original)
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if f"rope.scaling.{key}" in own:
            found[name] = float(own[f"rope.scaling.{key}"])
    # llama.cpp multiplies YaRN's own scale by this factor; transformers takes the product.
    extra = float(own.get("rope.scaling.attn_factor", 1.0)) * float(own.get("rope.scaling.yarn_attn_factor", 1.0))
    if extra != 1.0:
        found["attention_factor"] = extra * (0.1 * math.log(factor) + 1.0)
    return None if factor in (0.0, 1.0) else found


_SCALINGS: Final[Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any] | None]]] = {
    "none": lambda own: None,
    "linear": _linear,
    "yarn": _yarn,
}
_OF_SCALING: Final = frozenset(
    {
        "rope.scale_linear",
        *(
            f"rope.scaling.{name}"
            for name in ("factor", "original_context_length", "attn_factor", "yarn_attn_factor", "yarn_beta_fast")
        ),
        "rope.scaling.yarn_beta_slow",
    }
)


def _llama3(header: GgufHeader, divisors: list[float], theta: float) -> dict[str, Any]:
    """Return Llama 3.1's scaling, of which `rope_freqs.weight` holds what each frequency is divided by.

    Its low and high frequency factors are 1 and 4 in every such file; the original context is found by trying powers
    of two. Raises `ModelError` if no such scaling gives these divisors.
    """
    factor = max(divisors)
    for power in range(5, 21):
        original = 2**power
        if all(
            math.isclose(_llama3_divisor(index, len(divisors), theta, factor, original), divisor, rel_tol=1e-4)
            for index, divisor in enumerate(divisors)
        ):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise ModelError(
        f"{header.path}: the tensor {ROPE_FREQUENCIES} is not Llama 3.1's scaling of rotary positions.",
        found=f"divisors {', '.join(f'{divisor:g}' for divisor in divisors[:6])}, …",
    )


def _llama3_divisor(index: int, count: int, theta: float, factor: float, original: int) -> float:
    length = 2 * math.pi * theta ** (index / count)
    if length < original / 4.0:
        return 1.0
    if length > original:
        return factor
    smooth = (original / length - 1.0) / 3.0
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _check_keys(header: GgufHeader, own: Mapping[str, Any]) -> None:
    """Raise `ModelError` for a key that changes the model and has no place; warn of keys that are not known."""
    unknown = []
    for key, value in own.items():
        if key in _INERT or key in _OF_SCALING or value in _NEUTRAL.get(key, ()):
            continue
        if key in _NEUTRAL or _ALTERING.search(key):
            raise _no_place(header, f"{header.architecture}.{key}: {value}")
        unknown.append(f"{header.architecture}.{key}")
    if unknown:
        warnings.warn(f"{header.path}: metadata that is not known is not carried: {', '.join(unknown)}", stacklevel=3)


def _check_tensors(header: GgufHeader, model_type: str, values: Mapping[str, Any]) -> None:
    """Raise `ModelError` for a tensor that the class has no place for."""
    parts = [f"{part}.weight" for part in (*_TENSORS, *_NORMS.get(model_type, ()))]
    for group, field in PLAIN[model_type].items():
        if field is None:
            parts += [f"{part}.bias" for part in ("attn_q", "attn_k", "attn_v")]
        elif values.get(field):
            parts += [f"{part}.bias" for part in _BIASES[group]]
    known = {"token_embd.weight", "output_norm.weight", "output.weight", ROPE_FREQUENCIES}
    known |= {f"blk.{layer}.{part}" for layer in range(int(values.get("num_hidden_layers", 0))) for part in parts}
    extra = [name for name in header.tensors if name not in known]
    if extra:
        raise _no_place(header, ", ".join(extra[:4]) + (f" and {len(extra) - 4} more" if len(extra) > 4 else ""))


def _no_place(header: GgufHeader, what: str) -> ModelError:
    return ModelError(
        f"{header.path} holds what the class of '{header.architecture}' in transformers has no place for.",
        found=what,
        fix="use the original checkpoint in safetensors",
    )


def _foreign_config(header: GgufHeader) -> PreTrainedConfig:
    """Return the config that transformers reads, after a check for keys that it passes over."""
    known = GGUF_CONFIG_MAPPING.get(header.architecture.replace("-", "_"), {})
    if known and header.architecture != "gpt-oss":
        _check_keys(header, {key: value for key, value in header.own().items() if key not in known})
    try:
        return AutoConfig.from_pretrained(str(header.path.parent), gguf_file=header.path.name, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ModelError(f"{header.path} holds an architecture that is not read.", found=header.architecture) from error


@contextmanager
def name_map_built_once() -> Iterator[None]:
    """Let `gguf` build its table of tensor names once: transformers has it built anew for every submodule of a model.

    Of a model of 30 layers that is most of the time to load it.
    """
    import gguf

    build = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = lru_cache(build)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = build


def check_gguf_placed(model: PreTrainedModel, path: Path) -> None:
    """Raise `ModelError` for a tensor of a GGUF file that transformers did not put into `model`."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    header = read_gguf_header(path)
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config={})
    with name_map_built_once():
        placed = get_gguf_hf_weights_map(model, processor)
    # Experts are split or stacked by name, outside the map; rotary frequencies are part of the config.
    extra = [
        name for name in header.tensors if name not in placed and name != ROPE_FREQUENCIES and "_exps." not in name
    ]
    if extra:
        raise _no_place(header, ", ".join(extra[:4]) + (f" and {len(extra) - 4} more" if len(extra) > 4 else ""))
