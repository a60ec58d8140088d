"""Writing of GGUF files: one tensor at a time, each checked against what its type can hold."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.errors import ConversionError, UsageError
from xarch_kd.files import write_file
from xarch_kd.models.conversion.weights import check_finite, check_plain
from xarch_kd.models.gguf.architectures import gguf_layout
from xarch_kd.models.gguf.layout import TensorSource, Value
from xarch_kd.models.gguf.tokenizer import no_tokenizer_metadata, tokenizer_metadata

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
Progress = Callable[[int, int], None]
# Values of llama.cpp's `general.file_type`.
_FILE_TYPES: Final[Mapping[GgufType, int]] = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
_STORED: Final[Mapping[torch.dtype, GgufType]] = {torch.float16: "f16", torch.bfloat16: "bf16"}
# Largest error of a tensor relative to its root mean square that rounding alone makes: half a unit in the last place,
# 2⁻¹¹ and 2⁻⁸; for Q8_0, in a block of 32 numbers of at most m, (m / 254)² for each, beside the rounding of m / 127 to
# float16. What is beyond has left the range of the type.
_ROUNDING: Final[Mapping[GgufType, float]] = {
    "f32": 2.0**-23,
    "f16": 2.0**-11,
    "bf16": 2.0**-8,
    "q8_0": math.sqrt(32) / 254 + 2.0**-11,
}
_BLOCK: Final = 32
# Matrices that llama.cpp reads as float32 only.
_WIDE: Final = ("ssm_conv1d.weight", "ssm_norm.weight", "ssm_a", "ssm_d")


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A written file: llama.cpp's `architecture`, the type of its matrices, and how many of them are wider instead."""

    path: Path
    architecture: str
    dtype: GgufType
    widened: int


def export_gguf(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: GgufType | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GgufFile:
    """Write a model to the GGUF file `path` for llama.cpp, whole or not at all.

    Matrices are of `dtype` (default: the model's own), or float16 where a row is no multiple of Q8_0's 32 numbers; all
    else is float32. `progress` is called with the tensors that are written and their number. Raises `ConversionError`
    for a model that llama.cpp does not compute or a type that cannot hold its weights, `ModelError` for a tokenizer
    that GGUF cannot hold, `UsageError` if `path` exists or the package `gguf` is missing, `CheckpointError` if the file
    cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists.", fix="give the name of a new file")
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("Writing a GGUF file needs the package 'gguf'.", fix="pip install 'xarch_kd[gguf]'")
    layout = gguf_layout(model.config)
    check_plain(model)
    check_finite(model.state_dict(), what="The model")
    source = TensorSource(model)
    chosen: GgufType = dtype or _STORED.get(model.dtype, "f32")
    own = layout.metadata(model)
    metadata: dict[str, Value] = {
        "general.type": "model",
        "general.file_type": _FILE_TYPES[chosen],
        "general.quantization_version": 2,
    }
    metadata |= {f"{layout.architecture}.{key}": value for key, value in own.items()}
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    metadata |= no_tokenizer_metadata() if tokenizer is None else tokenizer_metadata(tokenizer, int(vocabulary))
    tensors = layout.tensors(model, source)
    if source.left:
        raise ConversionError(
            f"llama.cpp's architecture {layout.architecture} has no place for some of the model's weights.",
            found=", ".join(sorted(source.left)[:4]),
        )
    types: dict[str, GgufType] = {name: _type_of(name, tensor, chosen) for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        _write(partial, layout.architecture, metadata, tensors, types, progress or (lambda done, total: None))

    write_file(path, write, overwrite=overwrite)
    widened = sum(kind == "f16" for kind in types.values()) if chosen == "q8_0" else 0
    return GgufFile(path=path, architecture=layout.architecture, dtype=chosen, widened=widened)


def _type_of(name: str, tensor: Tensor, chosen: GgufType) -> GgufType:
    if tensor.ndim < 2 or name.endswith(_WIDE):
        return "f32"
    return "f16" if chosen == "q8_0" and tensor.shape[-1] % _BLOCK else chosen


def _write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, Tensor],
    types: Mapping[str, GgufType],
    progress: Progress,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    kinds = {name: getattr(gguf.GGMLQuantizationType, kind.upper()) for name, kind in types.items()}
    for name, tensor in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        writer.add_tensor_info(
            name, list(tensor.shape), np.dtype(np.float32), tensor.numel() // block * size, kinds[name]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for done, (name, tensor) in enumerate(tensors.items(), 1):
            exact = np.ascontiguousarray(tensor.float().numpy())
            stored = gguf.quants.quantize(exact, kinds[name])
            _check_held(name, exact, gguf.quants.dequantize(stored, kinds[name]), types[name])
            writer.write_tensor_data(stored)
            progress(done, len(tensors))
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Value) -> None:
    """Add one entry of the metadata; whole numbers are unsigned, as llama.cpp reads them."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _check_held(name: str, exact: np.ndarray, stored: np.ndarray, kind: GgufType) -> None:
    """Raise `ConversionError` if a tensor's numbers are outside the range of the type that it is stored in."""
    size = float(np.linalg.norm(exact))
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.linalg.norm(stored.reshape(exact.shape) - exact))
    if not error <= 1.01 * _ROUNDING[kind] * size:
        raise ConversionError(
            f"{kind.upper()} cannot hold the numbers of {name}: they are outside its range.",
            found=f"magnitudes of {float(np.abs(exact).max()):.3g} at most, relative error {error / size:.2g}",
            allowed=f"a relative error of {_ROUNDING[kind]:.2g}, which is rounding",
            fix="--dtype bf16 or f32, whose range is wider",
        )
