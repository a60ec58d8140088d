"""Loading of models, configs and tokenizers: no code from a checkpoint, no pickle but mamba_ssm's, plain tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from xarch_kd.errors import ModelError, suggest
from xarch_kd.files import check_sealed, expanded
from xarch_kd.models.loading.fit import (
    check_placed,
    check_scales,
    check_stored_dtypes,
    check_stored_placed,
    check_weights_finite,
    follow_loaded_head,
    follow_stored_head,
)
from xarch_kd.models.loading.gguf import check_gguf_placed, gguf_config, name_map_built_once
from xarch_kd.models.loading.quantized import (
    DEQUANTIZED,
    Quantization,
    check_full_precision,
    check_head,
    loading_options,
    stored_method,
)
from xarch_kd.models.loading.reference import (
    Source,
    check_config,
    read_config_json,
    resolve,
    without_implementations,
)
from xarch_kd.models.loading.stored import check_weights
from xarch_kd.models.loading.tokenizer_file import tokenizer_error
from xarch_kd.models.mamba_ssm.config import is_mamba_ssm, stock_config
from xarch_kd.models.mamba_ssm.format import import_mamba_ssm, mamba_ssm_folder_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(reference: str, revision: str | None = None) -> PreTrainedConfig:
    """Return the config of a model reference; no weights are read. Raises `ModelError`."""
    return _config(resolve(reference, revision))


def read_student_config(reference: str) -> PreTrainedConfig:
    """Return the config in a folder, or of a `config.json` file, that need not have weights. Raises `ModelError`."""
    path = expanded(reference)
    if not path.exists():
        return load_config(reference)
    values = read_config_json(path)
    check_config(values, where=str(path))
    return _from_values(values, where=str(path))


def _config(source: Source) -> PreTrainedConfig:
    if source.kind == "gguf" and source.path is not None:
        return gguf_config(source.path)
    if source.path is not None:
        if is_mamba_ssm_folder(source):
            return mamba_ssm_folder_config(source.path)
        config = _from_values(read_config_json(source.path), where=source.name)
        follow_stored_head(config, source.path)
        return config
    try:
        values, _ = PreTrainedConfig.get_config_dict(source.name, revision=source.revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            "The model's config could not be read from the hub.", asked=source.name, found=_first_line(error)
        ) from error
    check_config(values, where=source.name)
    if is_mamba_ssm(values):
        raise ModelError(
            "The model on the hub is in mamba_ssm's format, which is read from a folder only.",
            asked=source.name,
            fix=f"download it, e.g. hf download {source.name} --local-dir FOLDER, and name the folder",
        )
    return _from_values(values, where=source.name)


def is_mamba_ssm_folder(source: Source) -> bool:
    """Return whether a model is a folder in mamba_ssm's format, which is read as the stock class that it equals."""
    return source.kind == "folder" and source.path is not None and is_mamba_ssm(read_config_json(source.path))


def _from_values(values: dict[str, Any], *, where: str) -> PreTrainedConfig:
    if is_mamba_ssm(values):
        return stock_config(values, where=where)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        known = list(CONFIG_MAPPING.keys())
        raise ModelError(
            f"The config of {where} has a model_type that this version of transformers does not have."
            f"{suggest(str(model_type), known)}",
            found=f"model_type: {model_type}",
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(without_implementations(values))
    except Exception as error:
        # Strict configs raise a class of their own for each field; all of them mean that the file is wrong.
        raise ModelError(f"The config of {where} is not valid.", found=_first_line(error)) from error


def load_model(
    reference: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    config: PreTrainedConfig | None = None,
    quantization: Quantization | None = None,
    allow_quantized: bool = False,
) -> PreTrainedModel:
    """Return the causal language model of a reference, in eval mode, every weight a plain tensor of `dtype`.

    If `dtype` is None, it is the checkpoint's. A folder in mamba_ssm's format is loaded as the stock class that it
    equals. A frozen teacher may be quantized: with `allow_quantized` in its checkpoint, with `quantization` on the fly,
    by torchao; its head stays plain. Raises `ModelError` for weights that are missing, truncated, pickled, or not those
    of the config, and for a quantized checkpoint where it is not allowed; `CheckpointError` for files of a student
    that are not as they were written.
    """
    if (folder := expanded(reference)).is_dir():
        check_sealed(folder)
    source = resolve(reference, revision)
    if quantization is not None and (source.kind == "gguf" or is_mamba_ssm_folder(source)):
        raise ModelError(
            "Only a checkpoint of transformers is quantized on the fly.",
            asked=f"quantization: {quantization}",
            found=reference,
        )
    if source.path is not None and is_mamba_ssm_folder(source):
        return import_mamba_ssm(source.path, dtype=dtype).to(device)  # type: ignore[arg-type]  # stubs expect a bound method
    config = _config(source) if config is None else config
    if not allow_quantized:
        check_full_precision(config, where=reference)
    if source.kind == "folder" and source.path is not None:
        check_weights(source.path)
    quantized = loading_options(config, quantization, where=reference)
    has_codes = quantization is not None or stored_method(config) is not None
    is_dequantized = stored_method(config) in DEQUANTIZED
    if is_dequantized and source.kind == "folder" and source.path is not None:
        check_scales(source.path, where=reference)
    place: dict[str, Any] = {"pretrained_model_name_or_path": source.name, "use_safetensors": True}
    if source.kind == "gguf" and source.path is not None:
        place = {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
    elif source.path is not None:
        place["pretrained_model_name_or_path"] = str(source.path)
    try:
        with name_map_built_once() if source.kind == "gguf" else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **place,
                **quantized,
                revision=revision or "main",
                config=config,
                dtype="auto" if dtype is None else dtype,
                trust_remote_code=False,
                output_loading_info=True,
                # The report names them, and they are refused below; the error that is raised otherwise names nothing.
                ignore_mismatched_sizes=True,
            )
    except Exception as error:
        # The packages of quantized models raise whatever their settings lead to.
        if not has_codes and not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
            raise
        raise ModelError("The model could not be read.", asked=reference, found=_first_line(error)) from error
    model, report = loaded
    _check_loaded(model, report, source, has_codes=has_codes, is_dequantized=is_dequantized, where=reference)
    # A GGUF model keeps its quantizer, which would stop it from being saved, long after its weights are plain.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.to(device).eval()


def _check_loaded(
    model: PreTrainedModel,
    report: dict[str, Any],
    source: Source,
    *,
    has_codes: bool,
    is_dequantized: bool,
    where: str,
) -> None:
    """Raise `ModelError` unless a loaded model is what its files hold; a stored head is followed.

    `report` is the `output_loading_info` of transformers; `has_codes` is true for a model with quantized weights, and
    `is_dequantized` if they were multiplied by their scales on loading.
    """
    check_placed(report, model.config, where=where, is_dequantized=is_dequantized)
    if source.kind == "folder" and source.path is not None and not has_codes:
        check_stored_dtypes(model, source.path, where=where)
    if source.kind == "gguf" and source.path is not None:
        check_gguf_placed(model, source.path)
    check_weights_finite(model, where=where)
    follow_loaded_head(model, where=where)
    if has_codes:
        check_head(model, where=where)


def load_tokenizer(reference: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model reference. Raises `ModelError`."""
    source = resolve(reference, revision)
    options: dict[str, Any] = {"trust_remote_code": False, "revision": revision or "main"}
    name = source.name if source.path is None else str(source.path)
    if source.kind == "gguf" and source.path is not None:
        name, options["gguf_file"] = str(source.path.parent), source.path.name
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        # The libraries raise whatever they meet, the class Exception itself included.
        raise tokenizer_error(source, error) from error


@torch.no_grad()
def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round a model's parameters to `dtype` in place, as loading in that dtype would.

    Buffers stay as they are: `model.to(dtype)` would also round the rotary frequencies, and with them the logits.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def fresh_model(config: PreTrainedConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a randomly initialized model of `config` in eval mode; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model of `config` without storage, for its parameters' names and shapes. Raises `ModelError`."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    except Exception as error:
        # Classes do not check their sizes, and the errors that follow have no common type.
        raise ModelError(
            f"No {config.model_type} can be built with the values of its config.",
            found=f"{type(error).__name__}: {_first_line(error)}",
            fix="compare config.json with the one that the weights were saved with",
        ) from error


def check_files(model: PreTrainedModel, reference: str) -> None:
    """Raise `ModelError` unless the names of the weights in a folder are those of `model`; no weights are read.

    Hub ids, GGUF files, mamba_ssm folders and folders without weights pass: loading checks them.
    """
    source = resolve(reference)
    if source.kind == "folder" and source.path is not None and not is_mamba_ssm_folder(source):
        check_stored_placed(model, source.path, where=reference)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
