"""Token store: tokenized documents in files that are mapped into memory, one folder for each text and its settings."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import numpy

from xarch_kd.data.documents import OrderedHash, TokenizedDocuments
from xarch_kd.data.tokenization import TokenizedPart
from xarch_kd.errors import CheckpointError, DataError
from xarch_kd.files import write_folder, write_json

# Changes with what the files of a store are.
FORMAT: Final = 1
META: Final = "meta.json"
# Files of a store are hashed in blocks; so many of each, evenly spaced, are compared when it is opened.
BLOCK: Final = 32 * 2**20
COMPARED_BLOCKS: Final = 16
MIB: Final = 2**20
FILES: Final = ("lengths", "hashes", "ids", "counted")


class DamagedStore(Exception):
    """A store that is not there, or whose files are not what was written; caught where it is opened."""


def cache_folder() -> Path:
    """Return the folder of the token store: that of XARCH_KD_CACHE, or `~/.cache/xarch_kd`.

    Raises DataError where there is no home folder.
    """
    try:
        return Path(os.environ.get("XARCH_KD_CACHE") or "~/.cache/xarch_kd").expanduser()
    except RuntimeError as error:
        raise DataError("there is no folder for the token store", found=str(error), fix="set XARCH_KD_CACHE") from error


@dataclass
class StoreWriter:
    """Files of a new store in `folder`, written one document after another.

    In memory are 16 bytes per document. `limit` is the number of token ids of the tokenizer; `unlabelled` counts the
    documents of which no token is to be predicted.
    """

    folder: Path
    limit: int
    tokens: int = 0
    unlabelled: int = 0
    _lengths: array[int] = field(default_factory=lambda: array("q"))
    _hashes: array[int] = field(default_factory=lambda: array("Q"))
    _length: int = 0
    _is_partial: bool = False

    @property
    def documents(self) -> int:
        """Number of documents that were written."""
        return len(self._lengths)

    def write(self, parts: Iterable[TokenizedPart]) -> Iterator[int]:
        """Write the parts, and yield the number of tokens after each. Call `finish` after the last."""
        self.folder.mkdir()
        dtype = numpy.uint16 if self.limit <= 2**16 else numpy.uint32
        self._dtype, self._hash = dtype, OrderedHash()
        counted: IO[bytes] | None = None
        with open(self.folder / "ids", "wb") as ids:
            try:
                for part in parts:
                    if part.counted is not None and counted is None:
                        counted = open(self.folder / "counted", "wb")  # noqa: SIM115  # closed below
                        for start in range(0, self.tokens, MIB):
                            counted.write(b"\x01" * min(MIB, self.tokens - start))
                    ids.write(part.ids.astype(dtype).tobytes())
                    mask = numpy.ones(len(part.ids), bool) if part.counted is None else part.counted
                    if counted is not None:
                        counted.write(mask.tobytes())
                    self._is_partial = self._is_partial or not mask.all()
                    self.unlabelled += part.counted is not None and not mask.any()
                    self._hash.add(part.ids, mask)
                    self._end(part)
                    yield self.tokens
            finally:
                if counted is not None:
                    counted.close()

    def _end(self, part: TokenizedPart) -> None:
        self.tokens += len(part.ids)
        self._length += len(part.ids)
        if part.content is not None:
            self._lengths.append(self._length)
            self._hashes.append(int.from_bytes(part.content, "little"))
            self._length = 0

    def finish(self, notices: Iterable[str]) -> None:
        """Write the lengths, the hashes and what the store is; labels that count every token are left out."""
        lengths = numpy.frombuffer(self._lengths, numpy.int64) if self._lengths else numpy.zeros(0, numpy.int64)
        (self.folder / "lengths").write_bytes(lengths.tobytes())
        (self.folder / "hashes").write_bytes(self._hashes.tobytes())
        if not self._is_partial:
            (self.folder / "counted").unlink(missing_ok=True)
        names = [name for name in FILES if (self.folder / name).exists()]
        meta = {
            "format": FORMAT,
            "documents": len(lengths),
            "tokens": self.tokens,
            "ids": numpy.dtype(self._dtype).name,
            "fingerprint": self._hash.fingerprint(lengths, has_labels=self._is_partial),
            "notices": list(notices),
            "files": {name: _described(self.folder / name) for name in names},
        }
        write_json(self.folder / META, {**meta, "sha256": _sha256(meta)})
        for name in names:
            with open(self.folder / name, "rb") as file:
                os.fsync(file.fileno())


def write_store(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a store whole or not at all. Raises DataError, with what to free, where the disk is full or read-only."""
    try:
        write_folder(folder, write, overwrite=True)
    except CheckpointError as error:
        cause = error.__cause__
        is_full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space" in str(error.found)
        raise DataError(
            "cannot write the token store",
            asked=folder,
            found=error.found,
            fix=f"free some space: {cache_folder() / 'tokens'} holds the tokens of older texts and can be deleted, or "
            "set XARCH_KD_CACHE to a folder of another disk; nothing was left half written"
            if is_full
            else "set XARCH_KD_CACHE to a folder that can be written",
        ) from error


def open_store(folder: Path, *, name: str, description: str) -> tuple[TokenizedDocuments, list[str]]:
    """Return the documents of a store, and the notices of when it was written.

    Sizes and hashes are compared, those of large files in 16 blocks of 32 MiB. Raises DamagedStore with the reason.
    """
    meta = _meta(folder)
    for file, described in meta["files"].items():
        _compare(folder / file, described)
    lengths = numpy.fromfile(folder / "lengths", numpy.int64)
    hashes = numpy.fromfile(folder / "hashes", numpy.uint64)
    if not len(lengths) == len(hashes) == meta["documents"] or int(lengths.sum()) != meta["tokens"]:
        raise DamagedStore("documents are missing")
    documents = TokenizedDocuments(
        name=name,
        description=description,
        lengths=lengths,
        hashes=hashes,
        fingerprint=meta["fingerprint"],
        flat_ids=numpy.memmap(folder / "ids", dtype=meta["ids"], mode="r"),
        flat_counted=numpy.memmap(folder / "counted", dtype=bool, mode="r") if "counted" in meta["files"] else None,
        starts=numpy.cumsum(lengths) - lengths,
    )
    return documents, meta["notices"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process after another run the block for a folder, where the file system has locks."""
    import fcntl

    with ExitStack() as stack:
        # Without locks two processes may tokenize the same text; the last one to finish is kept.
        with suppress(OSError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder.with_name(f".{folder.name}.lock"), "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        found = meta.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedStore(f"{META}: {type(error).__name__}") from error
    if found != _sha256(meta) or meta["format"] != FORMAT:
        raise DamagedStore(f"{META}: not what was written")
    return meta


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _described(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        blocks = [_block(file, start) for start in range(0, size, BLOCK)]
    return {"bytes": size, "blocks": blocks}


def _compare(path: Path, described: Mapping[str, Any]) -> None:
    try:
        if path.stat().st_size != described["bytes"]:
            raise DamagedStore(f"{path.name}: {path.stat().st_size:,} bytes instead of {described['bytes']:,}")
        blocks = described["blocks"]
        chosen = {round(number) for number in numpy.linspace(0, len(blocks) - 1, min(len(blocks), COMPARED_BLOCKS))}
        with open(path, "rb") as file:
            for number in sorted(chosen):
                if _block(file, number * BLOCK) != blocks[number]:
                    raise DamagedStore(f"{path.name}: other bytes than were written")
    except OSError as error:
        raise DamagedStore(f"{path.name}: {error.strerror}") from error


def _block(file: IO[bytes], start: int) -> str:
    """Return the SHA-256 of a block, read in small parts so that little memory is used."""
    file.seek(start)
    digest = hashlib.sha256()
    for _ in range(BLOCK // MIB):
        digest.update(file.read(MIB))
    return digest.hexdigest()
