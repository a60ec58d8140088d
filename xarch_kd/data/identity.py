"""Identities of texts and tokenizers, by which the token store finds what it holds already."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from xarch_kd.errors import CheckpointError, DataError
from xarch_kd.files import write_json

# A file that changed this short before it was hashed may change again with the same times.
SETTLED_SECONDS: Final = 2.0
# Files that are hashed together are one unit of progress.
Progress = Callable[[int], None]


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_states(paths: Iterable[Path]) -> list[list[Any]]:
    """Return path, size, times and inode of each file, which change when it is written. Raises DataError."""
    try:
        found = ((path.resolve(), path.stat()) for path in paths)
        return [[str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for path, state in found]
    except OSError as error:
        raise DataError("a file of the text cannot be read", found=str(error)) from error


def files_identity(paths: Sequence[Path], cache: Path, progress: Progress) -> str:
    """Return the SHA-256 of the files' contents in order, from `cache` where none of them changed since.

    `progress` is called with the number of bytes that were hashed. Raises DataError for a file that cannot be read.
    """
    states = file_states(paths)
    known = cache / "files" / f"{sha256_json(states)[:40]}.json"
    try:
        return str(json.loads(known.read_text(encoding="utf-8"))["content"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    started, whole = time.time(), hashlib.sha256()
    for path, state in zip(paths, states, strict=True):
        try:
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError("a file of the text cannot be read", found=str(error)) from error
        progress(state[1])
    last = max((max(state[2], state[3]) for state in states), default=0) / 1e9
    if last < started - SETTLED_SECONDS:
        # Without the note the files are hashed again at the next start.
        with suppress(CheckpointError):
            write_json(known, {"content": whole.hexdigest(), "files": len(states)})
    return whole.hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of all that decides about token ids: vocabulary, rules, special tokens, template, versions."""
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        # Settings of the last call, which are part of its file.
        backend.no_truncation()
        backend.no_padding()
        rules: Any = hashlib.sha256(backend.to_str().encode()).hexdigest()
    else:
        rules = [
            sorted(tokenizer.get_vocab().items()),
            {key: str(value) for key, value in tokenizer.init_kwargs.items()},
        ]
    return sha256_json(
        {
            "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
            "rules": rules,
            "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
            "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id],
            "template": tokenizer.chat_template,
            "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
            "versions": [importlib.metadata.version(name) for name in ("tokenizers", "transformers")],
        }
    )
