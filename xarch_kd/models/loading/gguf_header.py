"""Header of a GGUF file: metadata and the table of tensors, in milliseconds; no token table is decoded.

The layout read here is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xarch_kd.errors import ModelError

VERSIONS: Final = (2, 3)
_FLOAT32: Final = 0
_ALIGNMENT: Final = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")


class _Cursor:
    """A position in a memory-mapped file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def read(self, layout: str) -> Any:
        (value,) = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return value

    def text(self) -> str:
        length = self.read("Q")
        raw = self.data[self.position : self.position + length]
        if len(raw) < length:
            raise struct.error("a string reaches past the end of the file")
        self.position += length
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        """Return a value; of an array of strings only its length."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.read(_SCALARS[kind])
        element, count = self.read("I"), self.read("Q")
        if element in _SCALARS:
            return [self.read(_SCALARS[element]) for _ in range(count)] if count <= 4096 else self._skip(element, count)
        # Token tables hold a hundred thousand strings, so the loop is kept to the least work per string.
        length_at, data, position = _LENGTH.unpack_from, self.data, self.position
        for _ in range(count):
            position += 8 + length_at(data, position)[0]
        self.position = position
        return count

    def _skip(self, element: int, count: int) -> int:
        self.position += count * struct.calcsize("<" + _SCALARS[element])
        return count


@dataclass(frozen=True)
class GgufTensor:
    """Entry of the table of tensors: `shape` as GGUF orders it, `kind` the number of its ggml type."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Metadata (arrays of strings as their lengths) and tensors by name; `data` is where tensors begin, in bytes."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data: int

    @property
    def architecture(self) -> str:
        """The prefix of the architecture's own metadata keys."""
        return str(self.metadata.get("general.architecture"))

    def own(self) -> dict[str, Any]:
        """Return the architecture's own metadata, by key without prefix."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}

    def floats(self, name: str) -> list[float]:
        """Return the entries of a one-dimensional float32 tensor. Raises `ModelError` for one of another type."""
        tensor = self.tensors[name]
        if tensor.kind != _FLOAT32 or len(tensor.shape) != 1:
            raise ModelError(f"{self.path}: the tensor {name} is not a list of float32.", found=tensor)
        with self.path.open("rb") as stream:
            stream.seek(self.data + tensor.offset)
            return list(struct.unpack(f"<{tensor.shape[0]}f", stream.read(4 * tensor.shape[0])))


def read_gguf_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file.

    Raises `ModelError` if the file is not a GGUF of version 2 or 3, or ends before its metadata does.
    """
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it does not begin with the bytes GGUF.")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            try:
                return _read(cursor, path)
            except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
                raise ModelError(f"{path} is truncated or damaged.", found=str(error)) from error


def _read(cursor: _Cursor, path: Path) -> GgufHeader:
    cursor.position = 4
    version, count, entries = cursor.read("I"), cursor.read("Q"), cursor.read("Q")
    if version not in VERSIONS:
        raise ModelError(f"{path} is a GGUF of a version that is not read.", found=version, allowed=VERSIONS)
    metadata = {}
    for _ in range(entries):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.read("I"))
    tensors = {}
    for _ in range(count):
        name = cursor.text()
        shape = tuple(cursor.read("Q") for _ in range(cursor.read("I")))
        tensors[name] = GgufTensor(shape, cursor.read("I"), cursor.read("Q"))
    if cursor.position > len(cursor.data):
        raise struct.error("the table of tensors reaches past the end of the file")
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    data = -(-cursor.position // alignment) * alignment
    return GgufHeader(path=path, metadata=metadata, tensors=tensors, data=data)
