"""Quantized teachers: which checkpoints transformers loads, which package they need, and int8 or int4 on the fly."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import ModelError

Quantization = Literal["int8", "int4"]
# Method in a checkpoint's config -> the modules that transformers needs for it; their pip names have hyphens.
PACKAGES: Final[dict[str, tuple[str, ...]]] = {
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
    "fp8": (),
}
# Methods whose weights are multiplied by their scales on loading; activations are not quantized then.
DEQUANTIZED: Final = ("compressed-tensors", "fp8")
# Formats of compressed-tensors whose values are compared with independent ones in the tests.
COMPRESSED_FORMATS: Final = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
# Weights per scale of int4.
_GROUP: Final = 32


def stored_method(config: PreTrainedConfig) -> str | None:
    """Return the quantization method that a checkpoint's config names, None for full precision."""
    values = _stored_values(config)
    if not values:
        return None
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return "bitsandbytes"
    method = values.get("quant_method")
    return str(getattr(method, "value", method))


def unsupported_reason(config: PreTrainedConfig, quantization: str | None) -> str | None:
    """Return why a quantized model cannot be loaded here, with the line that mends it, or None."""
    method = stored_method(config)
    if method is not None and quantization is not None:
        return f"the checkpoint is quantized already ({method}), so quantization: {quantization} cannot be asked for"
    if method is not None and method not in PACKAGES:
        return f"the checkpoint is quantized by the method {method}; allowed: {', '.join(PACKAGES)}, GGUF files"
    if method == "compressed-tensors" and (reason := _not_dequantized(_stored_values(config))) is not None:
        return reason
    packages = ("torchao",) if quantization is not None else PACKAGES[method] if method is not None else ()
    lacking = " ".join(name.replace("_", "-") for name in packages if importlib.util.find_spec(name) is None)
    if not lacking:
        return None
    what = f"quantization: {quantization}" if quantization is not None else f"a checkpoint quantized by {method}"
    return f"{what} needs the package {lacking}: pip install {lacking}"


def _stored_values(config: PreTrainedConfig) -> dict[str, Any]:
    found: Any = getattr(config, "quantization_config", None)
    return found if isinstance(found, dict) else found.to_dict() if found else {}


def _not_dequantized(values: Mapping[str, Any]) -> str | None:
    """Return why weights of compressed-tensors are not dequantized on loading, or None.

    transformers dequantizes all dense layers by the first group's scheme, and leaves transforms and sparsity out.
    """
    for key in ("transform_config", "sparsity_config"):
        part = values.get(key) or {}
        if part and part.get("format") != "dense":
            return f"the checkpoint has a {key}, which is left out when its weights are dequantized"
    groups = values.get("config_groups") or {}
    schemes = [group if isinstance(group, dict) else {"weights": name} for name, group in groups.items()]
    weights = {json.dumps(scheme.get("weights"), sort_keys=True, default=str) for scheme in schemes}
    formats = {scheme.get("format") or values.get("format") for scheme in schemes}
    if len(weights) != 1 or len(formats) != 1:
        return f"the checkpoint quantizes its layers by {len(weights)} schemes, and only one is dequantized"
    stored = str(formats.pop())
    if stored not in COMPRESSED_FORMATS:
        return f"the checkpoint has compressed-tensors' format {stored}; allowed: {', '.join(COMPRESSED_FORMATS)}"
    return None


def check_full_precision(config: PreTrainedConfig, *, where: str) -> None:
    """Raise `ModelError` for a quantized checkpoint where full-precision weights are needed."""
    method = stored_method(config)
    if method is not None:
        raise ModelError(
            "The checkpoint is quantized; conversion, and a student, take full-precision weights only.",
            asked=where,
            found=f"quantization_config: {method}",
            fix="name the checkpoint that it was quantized from; a quantized one can be a frozen teacher",
        )


def loading_options(config: PreTrainedConfig, quantization: str | None, *, where: str) -> dict[str, Any]:
    """Return what `from_pretrained` takes for a quantized model; methods in `DEQUANTIZED` become plain weights.

    Raises `ModelError` for a method or a package that is not there.
    """
    reason = unsupported_reason(config, quantization)
    if reason is not None:
        raise ModelError("The quantized model cannot be loaded.", asked=where, found=reason)
    if stored_method(config) in DEQUANTIZED:
        stored: Any = config.quantization_config  # type: ignore[attr-defined]
        stored["dequantize"] = True
    if quantization is None:
        return {}
    from transformers import TorchAoConfig

    torchao: Any = importlib.import_module("torchao.quantization")
    kinds = {
        "int8": torchao.Int8WeightOnlyConfig,
        # Runs on every device; the 4-bit values are stored in a byte each.
        "int4": lambda: torchao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, "int4"),  # noqa: B009  # torch's stubs lack it
            granularity=torchao.PerGroup(_GROUP),
        ),
    }
    return {"quantization_config": TorchAoConfig(kinds[quantization]())}


def full_precision(weight: Tensor) -> Tensor:
    """Return the values of a weight that may be of one of torchao's classes, as a plain tensor."""
    return weight if type(weight) in (Tensor, nn.Parameter) else weight.dequantize()


def check_head(model: PreTrainedModel, *, where: str) -> None:
    """Raise `ModelError` for a head that is quantized: token distributions are computed from its plain weight."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if isinstance(weight, Tensor) and (type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point()):
        raise ModelError(
            "The head of the quantized model is quantized too, and token distributions need its plain weight.",
            asked=where,
            found=f"{type(weight).__name__} of {weight.dtype}",
            fix="use a checkpoint whose lm_head was left out of quantization, which is the default of these methods",
        )
