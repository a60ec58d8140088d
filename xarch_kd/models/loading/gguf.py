"""Model config from a GGUF file's metadata, in milliseconds: no tensor is read and no token table is decoded.

The layout read here is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from xarch_kd.errors import ModelError

VERSIONS = (2, 3)

# Architectures with complete metadata; the others use the (slow) reader of transformers.
PLAIN = ("llama", "mistral", "qwen2", "qwen3")

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


def gguf_metadata(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the metadata (arrays of strings as their lengths) and the tensors' names of a GGUF file.

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


def _read(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    cursor.position = 4
    version, tensors, entries = cursor.read("I"), cursor.read("Q"), cursor.read("Q")
    if version not in VERSIONS:
        raise ModelError(f"{path} is a GGUF of a version that is not read.", found=version, allowed=VERSIONS)
    metadata = {}
    for _ in range(entries):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.read("I"))
    names = []
    for _ in range(tensors):
        names.append(cursor.text())
        dimensions = cursor.read("I")
        cursor.position += 8 * dimensions + 12
    if cursor.position > len(cursor.data):
        raise struct.error("the table of tensors reaches past the end of the file")
    return metadata, tuple(names)


def gguf_config(path: Path) -> PreTrainedConfig:
    """Return the config that transformers itself gives for a GGUF file. Raises `ModelError`."""
    metadata, names = gguf_metadata(path)
    architecture = metadata.get("general.architecture")
    if architecture not in PLAIN:
        try:
            return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        except (ValueError, OSError) as error:
            raise ModelError(f"{path} holds an architecture that is not read.", found=architecture) from error
    # llama.cpp writes Mistral models as llama; transformers distinguishes them by this name.
    is_mistral = architecture == "llama" and metadata.get("general.name") == "mistral"
    model_type = "mistral" if is_mistral else architecture
    values: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in names}
    for key, value in metadata.items():
        prefix, _, rest = key.partition(".")
        prefix = model_type if prefix == architecture else prefix
        name = GGUF_CONFIG_MAPPING.get(prefix, {}).get(rest)
        if name is not None:
            values[name] = value
    values["model_type"] = model_type
    if "vocab_size" not in values and "tokenizer.ggml.tokens" in metadata:
        values["vocab_size"] = metadata["tokenizer.ggml.tokens"]
    return CONFIG_MAPPING[model_type].from_dict(values)
