"""Checkpoints of `mamba_ssm.MambaLMHeadModel.from_pretrained`: export, and import as a stock model.

Such a folder holds `config.json` and `pytorch_model.bin`. The latter is a Python pickle; it is read by torch's loader
for tensors alone, which runs no code. Nothing of the package `mamba_ssm` is imported.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.errors import ModelError
from xarch_kd.files import check_sealed, seal, write_folder
from xarch_kd.models.conversion.check import runnable
from xarch_kd.models.conversion.weights import check_finite
from xarch_kd.models.loading.reference import read_config_json
from xarch_kd.models.mamba_ssm.config import is_mamba_ssm, mamba_ssm_config, stock_config
from xarch_kd.models.mamba_ssm.weights import mamba_ssm_state, stock_state, widened_mlp

WEIGHTS = "pytorch_model.bin"
GENERATION = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_mamba_ssm(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a Bamba, GraniteMoeHybrid, Mamba-2 or Mamba model to `folder` in mamba_ssm's format, and return the folder.

    The weights are the model's own, in its dtype; ids of special tokens are stored for a later import. Written
    whole or not at all. Raises `ConversionError` for what the format cannot hold, `UsageError` if `folder` holds
    something and `overwrite` is False, `ModelError` for NaN or infinite weights, `CheckpointError` if it cannot be
    written.
    """
    config = mamba_ssm_config(model.config)
    state = model.state_dict()
    check_finite(state, what="The model")
    exported = mamba_ssm_state({name: value.detach().cpu() for name, value in state.items()}, model.config)

    def write(scratch: Path) -> None:
        scratch.mkdir()
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        torch.save(exported, scratch / WEIGHTS)
        tokens = {name: getattr(model.config, name, None) for name in TOKENS}
        GenerationConfig(**{name: value for name, value in tokens.items() if value is not None}).save_pretrained(
            scratch
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        seal(scratch)

    return write_folder(Path(folder), write, overwrite=overwrite)


def import_mamba_ssm(folder: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the model of a folder in mamba_ssm's format as the stock class that equals it, in eval mode, on the CPU.

    `dtype` is that of the weights in the file if it is None. Raises `ModelError` for a folder that is not of this
    format, for one that no stock class equals, and for weights that are not those of the config.
    """
    folder = Path(folder)
    check_sealed(folder)
    config = mamba_ssm_folder_config(folder)
    state = _weights(folder)
    dtype = dtype or state.get("backbone.embedding.weight", torch.zeros(0)).dtype
    state = {name: value.to(dtype) for name, value in state.items()}
    check_finite(state, what=str(folder))
    width = widened_mlp(state, config)
    if width is not None:
        config.update({"intermediate_size": width})
    config.dtype = dtype
    stock = {name: value.to(dtype).clone() for name, value in stock_state(state, config, where=str(folder)).items()}
    if config.tie_word_embeddings:
        stock["lm_head.weight"] = stock[next(name for name in stock if "embed" in name)]
    model = runnable(config, stock, torch.device("cpu"))
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.requires_grad_(True)


def mamba_ssm_folder_config(folder: Path) -> PreTrainedConfig:
    """Return the stock config of a folder in mamba_ssm's format; no weights are read. Raises `ModelError`."""
    values = read_config_json(folder)
    if not is_mamba_ssm(values):
        raise ModelError(
            f"{folder} is not in mamba_ssm's format: its config has no d_model and n_layer, or has a model_type.",
            found=", ".join(sorted(values)[:6]),
            fix="a model of transformers needs no import; it is read as it is",
        )
    config = stock_config(values, where=str(folder))
    if (folder / GENERATION).is_file():
        beside = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
        config.update({name: beside[name] for name in TOKENS if beside.get(name) is not None})
    return config


def _weights(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS}, where mamba_ssm keeps its weights.", fix="copy it there")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{file} could not be read as tensors alone; nothing else in it is run.",
            found=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix="if it is whole, save its state dict again with torch.save where you trust it",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{file} does not hold a state dict.", found=type(state).__name__)
    return state
