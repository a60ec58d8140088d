"""Tokenizer files, read before any model: number of tokens, and files that the installed version cannot read."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from xarch_kd.errors import ModelError
from xarch_kd.models.loading.gguf_header import read_gguf_header
from xarch_kd.models.loading.reference import Source, resolve

TOKENIZER: Final = "tokenizer.json"
# A folder with one of these has a tokenizer.
_FILES: Final = (TOKENIZER, "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def stored_tokens(reference: str, revision: str | None = None) -> int | None:
    """Return the number of tokens of a GGUF file or `tokenizer.json`, or None where neither is at hand.

    Raises `ModelError` for a `tokenizer.json` that the installed tokenizers library cannot read.
    """
    source = resolve(reference, revision)
    if source.path is None:
        return None
    if source.kind == "gguf":
        count = read_gguf_header(source.path).metadata.get("tokenizer.ggml.tokens")
        return count if isinstance(count, int) else None
    file = source.path / TOKENIZER
    return _read(file).get_vocab_size(with_added_tokens=True) if file.is_file() else None


def has_tokenizer(reference: str, revision: str | None = None) -> bool:
    """Return whether a tokenizer is stored with a model; True for a hub id, which is not looked up."""
    source = resolve(reference, revision)
    return source.path is None or source.kind == "gguf" or any((source.path / name).is_file() for name in _FILES)


def tokenizer_error(source: Source, error: Exception) -> ModelError:
    """Return the error for a tokenizer that a library could not read: the file and the likely cause."""
    file = None if source.path is None or source.kind == "gguf" else source.path / TOKENIZER
    if file is not None and file.is_file():
        try:
            _read(file)
        except ModelError as found:
            return found
    elif file is not None:
        names = sorted(path.name for path in file.parent.iterdir())
        return ModelError(
            f"{file.parent} holds no {TOKENIZER}, and no tokenizer could be made from its other files.",
            found=", ".join(names)[:200],
            fix="copy it from where the model came from, or give tokenizer: another reference, in the mapping file",
        )
    lines = str(error).strip().splitlines()
    return ModelError(
        "The tokenizer could not be read.",
        asked=source.name,
        found=lines[0] if lines else type(error).__name__,
        fix="give tokenizer: another reference, in the mapping file",
    )


def _read(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        # The library raises the class Exception itself for whatever is wrong.
        raise ModelError(
            f"{file} cannot be read by tokenizers {importlib.metadata.version('tokenizers')}.",
            found=str(error),
            fix="it is damaged, or likely written by a newer version: pip install -U tokenizers transformers, or copy "
            "the file again",
        ) from error
