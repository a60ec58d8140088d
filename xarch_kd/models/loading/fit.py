"""Checks that a loaded model is what its checkpoint holds: no weight without a place, no NaN, heads as stored."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from xarch_kd.errors import ModelError
from xarch_kd.models.conversion.weights import check_finite
from xarch_kd.models.loading.quantized import full_precision, stored_method
from xarch_kd.models.loading.stored import INDEX, WEIGHTS, StoredTensor, same_bytes, stored_tensors

# Buffers that old releases of transformers saved and that a model computes itself.
HARMLESS: Final = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids)$")
# Prefixes that wrappers put before every key.
WRAPPERS: Final = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_model.model.")
_CAUSES: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"lora_|modules_to_save"), "unmerged LoRA weights: merge them first, e.g. peft's merge_and_unload()"),
    (
        re.compile(r"(weight_scale|scale_inv|input_scale|activation_scale|\.scales|qweight|qzeros|absmax|quant_)"),
        "quantized weights whose config has no quantization_config: load them where they were made and save them in "
        "full precision",
    ),
    (re.compile(r"\.bias$"), "biases that the config turns off, e.g. attention_bias: false or mlp_bias: false"),
)
# Scales of activations and of a quantized cache: they round what a model computes, and are not applied to weights.
_ACTIVATION_SCALES: Final = re.compile(r"\.(input|output|[qkv])_(scale|zero_point|global_scale)$")
# Types of safetensors whose values are the weights.
_PLAIN_DTYPES: Final = ("F64", "F32", "F16", "BF16")
_COMPARE: Final = "compare config.json with the one that the weights were saved with"
_HEADS: Final = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def check_placed(
    report: Mapping[str, Any], config: PreTrainedConfig, *, where: str, is_dequantized: bool = False
) -> None:
    """Raise `ModelError` if weights are missing, of another shape, or have no place in the model of their config.

    `report` is the `output_loading_info` of transformers. Scales of activations have no place in a model whose weights
    were dequantized, and pass.
    """
    shapes = sorted(report.get("mismatched_keys", ()), key=str)
    if shapes:
        listed = [f"{name} {tuple(stored)}, by the config {tuple(wanted)}" for name, stored, wanted in shapes]
        raise ModelError(
            f"The checkpoint holds {len(shapes)} weights of another shape than its config gives.",
            asked=where,
            found=_listed(listed),
            fix=_COMPARE,
        )
    missing, extra = (sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys"))
    extra = [key for key in extra if not HARMLESS.search(key)]
    if is_dequantized:
        extra = [key for key in extra if not _ACTIVATION_SCALES.search(key)]
    wrapper = _wrapper(extra)
    if extra and (wrapper or not missing):
        raise ModelError(
            f"The checkpoint holds {len(extra)} weights that have no place in the model of its config.",
            asked=where,
            found=_listed(extra),
            fix=f"the prefix '{wrapper}' is a wrapper's: save the model inside it, or strip the prefix from the keys"
            if wrapper
            else _cause(extra, config),
        )
    if missing:
        raise ModelError(
            f"The checkpoint lacks {len(missing)} weights that its config requires.",
            asked=where,
            found=f"missing: {_listed(missing)}" + (f"; without a place: {_listed(extra)}" if extra else ""),
            fix=_COMPARE,
        )


def check_stored_placed(model: PreTrainedModel, folder: Path, *, where: str) -> None:
    """Raise `ModelError` as `check_placed` does, from the names in a folder's safetensors files; no weights are read.

    `model` may be on the meta device. Names of older releases are first renamed as transformers renames them. Quantized
    checkpoints and folders without weights pass: loading checks them.
    """
    if stored_method(model.config) or not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        return
    check_stored_dtypes(model, folder, where=where)
    state = model.state_dict()
    places = _places(model, folder)
    found, are_converted = {name for name, _ in places.values()}, any(converted for _, converted in places.values())
    # One stored tensor may become several, whose names are not all known here.
    missing = set() if are_converted else state.keys() - found - getattr(model, "all_tied_weights_keys", {}).keys()
    report = SimpleNamespace(missing_keys=missing, unexpected_keys=found - state.keys())
    model._adjust_missing_and_unexpected_keys(report)  # type: ignore[arg-type]  # reads these two
    check_placed(vars(report), model.config, where=where)


def check_stored_dtypes(model: PreTrainedModel, folder: Path, *, where: str) -> None:
    """Raise `ModelError` for a weight that a folder stores in a type of quantized values, by a config of plain ones.

    transformers would take these values for the weights; what scales them is not in the file or has no place. Not to be
    called for a config with quantization_config.
    """
    floating = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    places, tensors = _places(model, folder), stored_tensors(folder)
    wrong = [
        f"{name} of {tensors[name].dtype}"
        for name, (place, _) in places.items()
        if place in floating and tensors[name].dtype not in _PLAIN_DTYPES
    ]
    if wrong:
        raise ModelError(
            f"The checkpoint stores {len(wrong)} weights in a type of quantized values, without quantization_config.",
            asked=where,
            found=_listed(wrong),
            allowed=" | ".join(_PLAIN_DTYPES),
            fix="save the model in full precision where it was quantized, or with its quantization_config",
        )


def check_scales(folder: Path, *, where: str) -> None:
    """Raise `ModelError` for a quantized weight without a scale, whose values would be taken for the weight's.

    To be called for the methods whose weights are multiplied by their scales on loading.
    """
    tensors = stored_tensors(folder)
    wrong = [
        f"{name} of {stored.dtype}"
        for name, stored in tensors.items()
        if name.endswith((".weight", ".weight_packed"))
        and stored.dtype not in _PLAIN_DTYPES
        and not any(name.removesuffix("_packed") + ending in tensors for ending in ("_scale", "_scale_inv"))
    ]
    if wrong:
        raise ModelError(
            f"The checkpoint stores {len(wrong)} quantized weights without a scale.",
            asked=where,
            found=_listed(wrong),
            fix="save the model again where it was quantized, or download it again",
        )


def _places(model: PreTrainedModel, folder: Path) -> dict[str, tuple[str, bool]]:
    """Return, for each tensor that a folder stores, its name in the model, and if it is converted when it is loaded."""
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    places = {}
    for name in stored_tensors(folder):
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        places[name] = renamed, converter is not None
    return places


def _wrapper(extra: Collection[str]) -> str:
    """Return the prefix that all keys share if it is one of a wrapper's, or an empty string."""
    return next((prefix for prefix in WRAPPERS if extra and all(key.startswith(prefix) for key in extra)), "")


def _cause(extra: Collection[str], config: PreTrainedConfig) -> str:
    """Return the likely cause of keys without a place."""
    for pattern, cause in _CAUSES:
        if any(pattern.search(key) for key in extra):
            return f"likely {cause}"
    depth = getattr(config, "num_hidden_layers", None)
    layers = {int(found.group(1)) for key in extra if (found := re.search(r"\.(\d+)\.", key))}
    if isinstance(depth, int) and layers and min(layers) >= depth:
        return f"likely too few layers in config.json: it has {depth}, and the file has layer {max(layers)}"
    return _COMPARE


def _listed(keys: Collection[str]) -> str:
    shown = list(keys)[:4]
    return ", ".join(shown) + (", …" if len(keys) > len(shown) else "")


def check_weights_finite(model: nn.Module, *, where: str) -> None:
    """Raise `ModelError` that names the first weight with a NaN or infinite entry."""
    check_finite({name: full_precision(value) for name, value in model.state_dict().items()}, what=where)


def follow_stored_head(config: PreTrainedConfig, folder: Path) -> None:
    """Untie the head of `config` if its folder stores a head that differs from the embedding, and warn.

    transformers loads both tensors then, whatever `tie_word_embeddings` is; everything else follows the config.
    """
    if not _is_tied(config) or not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        return
    tensors = stored_tensors(folder)
    head, embedding = (_ending(tensors, endings) for endings in (_HEADS, _EMBEDDINGS))
    if head is not None and embedding is not None and not same_bytes(tensors[head], tensors[embedding]):
        _untie(config, where=str(folder))


def follow_loaded_head(model: PreTrainedModel, *, where: str) -> None:
    """Untie the head in a model's config if the loaded head differs from the embedding, and warn."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not _is_tied(model.config) or head is None or head.weight is embedding.weight:
        return
    own, other = head.weight, embedding.weight
    if isinstance(own, Tensor) and isinstance(other, Tensor) and not torch.equal(own, other):
        _untie(model.config, where=where)


def _is_tied(config: PreTrainedConfig) -> bool:
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def _untie(config: PreTrainedConfig, *, where: str) -> None:
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False
    warnings.warn(
        f"{where}: config.json has tie_word_embeddings: true, but the stored head differs from the embedding; the "
        "weights are followed and the head is untied",
        stacklevel=3,
    )


def _ending(tensors: Mapping[str, StoredTensor], endings: tuple[str, ...]) -> str | None:
    return next((name for name in tensors if name.endswith(endings)), None)
