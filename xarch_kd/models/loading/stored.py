"""Safetensors files of a checkpoint folder: their list, their headers, and single tensors; no library reads them first.

A file that is cut short, an index that is damaged and a tensor that is stored twice are named. Only the standard
library is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from xarch_kd.errors import ModelError

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_AGAIN = "copy or download it again"
# Bytes of two tensors that are compared at a time.
_CHUNK: Final = 2**20


@dataclass(frozen=True)
class StoredTensor:
    """Position of one tensor in a checkpoint: `start` and `stop` are byte offsets in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def check_weights(folder: Path) -> None:
    """Raise `ModelError` unless a folder holds whole safetensors files: headers and offsets against file sizes."""
    stored_tensors(folder)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint folder by name, from the headers of its files.

    Raises `ModelError` for a folder without safetensors, a missing or damaged file or index, and a tensor that two
    files hold.
    """
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if not (folder / WEIGHTS).is_file():
        raise _no_weights(folder)
    return _header(folder / WEIGHTS)


def same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two tensors have equal dtype, shape and bytes; reading ends at the first difference."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(one == other for one, other in zip(_chunks(first), _chunks(second), strict=True))


def _chunks(tensor: StoredTensor) -> Iterator[bytes]:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        for start in range(tensor.start, tensor.stop, _CHUNK):
            yield stream.read(min(_CHUNK, tensor.stop - start))


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX
    places = _weight_map(index)
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        for tensor, stored in _header(folder / name).items():
            if tensor in found:
                raise ModelError(
                    f"The tensor {tensor} is stored twice in {folder}.",
                    found=f"{found[tensor].file.name} and {name}",
                    fix="delete the shards that belong to another checkpoint, or download the model again",
                )
            found[tensor] = stored
    wrong = [f"{tensor} in {name}" for tensor, name in places.items() if tensor not in _of(found, folder / name)]
    if wrong:
        raise ModelError(
            f"{index} does not fit the shards: {len(wrong)} tensors are not in the file that it names.",
            found=", ".join(wrong[:3]),
            fix=_AGAIN,
        )
    return found


def _of(tensors: Mapping[str, StoredTensor], file: Path) -> set[str]:
    return {name for name, stored in tensors.items() if stored.file == file}


def _weight_map(index: Path) -> dict[str, str]:
    """Return the shard of each tensor; names of shards are files of the same folder."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{index} is not JSON, so the shards are not known.", found=str(error), fix=_AGAIN) from error
    places: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(
            f"{index} has no weight_map, so the shards are not known.",
            found=", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__,
            allowed='{"weight_map": {"TENSOR": "FILE.safetensors", …}}',
            fix=_AGAIN,
        )
    outside = sorted(name for name in set(places.values()) if PurePosixPath(name).name != name)
    if outside:
        raise ModelError(f"{index} names files outside its folder.", found=", ".join(outside[:3]))
    return places


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return ModelError(
            f"{folder} holds its weights as Python pickles, which can run code when read; they are not read.",
            found=", ".join(pickles),
            allowed="safetensors or GGUF",
            fix="convert it once where you trust it: model.save_pretrained(folder)",
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        variant = others[0].removeprefix("model.").removesuffix(".safetensors") if len(others) == 1 else ""
        return ModelError(
            f"{folder} holds no {WEIGHTS} and no {INDEX}.",
            found=", ".join(others[:4]),
            allowed=f"{WEIGHTS}, or shards with their index",
            fix=f"this is the variant '{variant}': rename it to {WEIGHTS} if it is the intended one"
            if variant and others[0].startswith("model.")
            else "download the index too; shards without it are not read, because one may be missing",
        )
    return ModelError(f"{folder} holds no weights.", allowed=f"{WEIGHTS}, or shards with their index")


def _header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file. Raises `ModelError` unless its size is that of its header and data."""
    if not file.is_file():
        raise ModelError(f"The shard {file.name} is missing from {file.parent}.", fix="download the model again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(
                f"{file} is truncated: its header does not fit the file.",
                found=f"{size} bytes, header of {length} bytes",
                fix=_AGAIN,
            )
        try:
            header = json.loads(stream.read(length))
            tensors = {
                name: StoredTensor(
                    file,
                    str(entry["dtype"]),
                    tuple(map(int, entry["shape"])),
                    8 + length + int(entry["data_offsets"][0]),
                    8 + length + int(entry["data_offsets"][1]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"{file} is not a safetensors file.", found=str(error)) from error
    stop = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if size != stop:
        raise ModelError(
            f"{file} is truncated." if size < stop else f"{file} is larger than its header states.",
            found=f"{size} bytes, the header states {stop}",
            fix=_AGAIN,
        )
    return tensors
