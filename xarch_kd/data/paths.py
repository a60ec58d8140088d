"""Data files that paths, folders and glob patterns name, their formats, and their bytes without compression."""

from __future__ import annotations

import glob
import gzip
import importlib
import io
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

from xarch_kd.errors import DataError

Format = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]

# Formats by suffix, in any case, before one of COMPRESSIONS. Every other suffix is plain text where it is named.
FORMATS: Final[dict[str, Format]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSIONS: Final = (".gz", ".zst")
# Plain text that is read from a folder; files with other suffixes are read where they are named or matched.
TEXT_SUFFIXES: Final = (".txt", ".text", ".md", ".markdown", ".rst")
ARCHIVES: Final = (".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".lz4", ".zlib")
COPY_BYTES: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """File of a text source, with its format and its compression (a suffix, or an empty string)."""

    path: Path
    format: Format
    compression: str

    @classmethod
    def of(cls, path: Path) -> DataFile:
        """Return the file with the format that its name has. Raises DataError for an archive."""
        suffixes = [suffix.lower() for suffix in path.suffixes]
        compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
        last = suffixes[-1] if suffixes else ""
        if last in ARCHIVES:
            raise DataError(
                f"{path} is an archive or has a compression that is not read",
                allowed=f"plain files, or one of {', '.join(COMPRESSIONS)}",
                fix="unpack it, and name the files or their folder",
            )
        return cls(path=path, format=FORMATS.get(last, "text"), compression=compression)

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open the file for reading bytes without their compression. Raises DataError where that fails."""
        try:
            with open(self.path, "rb") as plain:
                if self.compression == ".gz":
                    yield gzip.GzipFile(fileobj=plain)  # type: ignore[misc]
                elif self.compression == ".zst":
                    yield io.BufferedReader(_ZstdFile(plain), COPY_BYTES)
                else:
                    yield plain
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"cannot read {self.path}", found=str(error) or type(error).__name__, fix=self._repair()
            ) from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            raise DataError(f"cannot read {self.path}", found=str(error), fix=self._repair()) from error

    @contextmanager
    def seekable(self) -> Iterator[IO[bytes]]:
        """Open the file for reading at any position; a compressed one is unpacked to a temporary file first."""
        with self.opened() as stream:
            if not self.compression:
                yield stream
                return
            with tempfile.TemporaryFile() as unpacked:
                while block := stream.read(COPY_BYTES):
                    unpacked.write(block)
                unpacked.seek(0)
                yield unpacked

    def _repair(self) -> str:
        return "copy the file again: it may be cut short" if self.compression else "check the file and its permissions"


class _ZstdFile(io.RawIOBase):
    """Bytes of a .zst file of one or more frames. A file that is cut short raises EOFError, as gzip's does."""

    def __init__(self, plain: IO[bytes]) -> None:
        self._plain = plain
        self._decompressor = importlib.import_module("zstandard").ZstdDecompressor()
        self._frame: Any = None
        self._compressed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            if not self._compressed:
                self._compressed = self._plain.read(COPY_BYTES // 8)
                if not self._compressed:
                    if self._frame is not None:
                        raise EOFError("the compressed file ended before its end marker")
                    return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._unpacked = self._frame.decompress(self._compressed)
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size


@dataclass(frozen=True, kw_only=True)
class FoundFiles:
    """Files of a text source in their order, and one-line notices about those that were left out."""

    files: tuple[DataFile, ...]
    notices: tuple[str, ...]


def find_files(patterns: Sequence[str]) -> FoundFiles:
    """Return the data files that `patterns` name: paths of files and folders, and glob patterns.

    A name that exists is that file, even with brackets in it. A folder stands for the data files in it and in its
    subfolders, those of a known suffix, in the order of their paths; hidden ones are left out. A file that is named
    twice is read once. Raises DataError where a pattern has no file, or one that is not a regular file.
    """
    files: dict[Path, DataFile] = {}
    notices: list[str] = []
    for pattern in patterns:
        path = Path(_expanded(pattern))
        found = [path] if path.exists() or path.is_symlink() else _matches(pattern)
        plain = [file for file in found if not file.is_dir()]
        for folder in () if plain else found:
            plain.extend(_inside(folder, notices))
        twice = 0
        for file in plain:
            if not file.is_file():
                raise DataError(f"{file} is not a file that can be read", asked=pattern, allowed="files and folders")
            twice += file.resolve() in files
            files.setdefault(file.resolve(), DataFile.of(file))
        if twice:
            notices.append(f"{twice} files of '{pattern}' were named before and are read once")
    return FoundFiles(files=tuple(files.values()), notices=tuple(notices))


def _expanded(pattern: str) -> str:
    return os.path.expanduser(pattern)


def _matches(pattern: str) -> list[Path]:
    found = sorted(glob.glob(_expanded(pattern), recursive=True))
    if not found:
        raise DataError(
            "a file pattern matches nothing",
            asked=pattern,
            found=f"no file under {Path.cwd()}",
            fix="give a path, a folder or a glob pattern from the working directory, e.g. files: ['texts/*.txt']",
        )
    return [Path(name) for name in found]


def _inside(folder: Path, notices: list[str]) -> list[Path]:
    """Return the data files in a folder and its subfolders."""
    files: list[Path] = []
    others: set[str] = set()
    saved = next((name for name in ("state.json", "dataset_dict.json") if (folder / name).is_file()), None)
    if saved is not None:
        raise DataError(
            f"{folder} was written by save_to_disk of the library datasets",
            found=saved,
            fix=f"name it as a dataset: dataset: {folder}",
        )
    for root, names, entries in os.walk(folder, onerror=_unreadable):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for entry in sorted(entries):
            path = Path(root) / entry
            if entry.startswith("."):
                continue
            if _is_data(path):
                files.append(path)
            else:
                others.add(path.suffix or entry)
    if not files:
        raise DataError(
            f"the folder {folder} has no data file",
            found=f"files with other suffixes: {', '.join(sorted(others)[:8])}" if others else "no file",
            allowed=", ".join([*TEXT_SUFFIXES, *FORMATS]) + f", each also with {' or '.join(COMPRESSIONS)}",
            fix=f"name other files of plain text by a pattern: files: ['{folder}/**/*.*']",
        )
    if others:
        notices.append(f"files of {folder} with other suffixes are not read: {', '.join(sorted(others)[:8])}")
    return sorted(files)


def _is_data(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return bool(suffixes) and (suffixes[-1] in FORMATS or suffixes[-1] in TEXT_SUFFIXES)


def _unreadable(error: OSError) -> None:
    raise DataError("cannot read a folder", found=str(error)) from error
