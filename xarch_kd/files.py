"""Files and folders that are written whole or not at all.

Everything is written beside its final name and renamed into place, so that a full disk or a crash leaves what was there
before. torch and safetensors are imported on use: a mapping file is written without them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xarch_kd.errors import CheckpointError, UsageError, XarchError

if TYPE_CHECKING:
    from torch import Tensor

# Key of the checksum in the metadata of a file of tensors.
CHECKSUM: Final = "sha256"
# SHA-256 of every other file of a folder, written last.
CHECKSUM_FILE: Final = "checksums.json"


def expanded(path: str | Path) -> Path:
    """Return a path with `~` expanded. Raises UsageError for one that no file can have."""
    try:
        found = Path(path).expanduser()
        found.exists()
    except (RuntimeError, OSError, ValueError) as error:
        # An unknown user after ~, a name that is too long, or a folder that may not be read.
        raise UsageError(
            "This path cannot be looked up.", asked=path, found=getattr(error, "strerror", None) or str(error)
        ) from error
    return found


def write_file(path: Path, write: Callable[[Path], object], *, overwrite: bool = True) -> None:
    """Call `write` with a name beside `path`, flush the file to the disk and rename it to `path`.

    Missing parent folders are made. Raises CheckpointError if it cannot be written, and UsageError if `path` exists
    and `overwrite` is False, even if it appears while `write` runs.
    """
    if not overwrite and path.exists():
        raise _exists(path)
    # Two processes may write the same file; the last one to finish wins.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        _flush(partial)
        if not overwrite:
            # Fails if the file exists by now; a hard link would too, but not every file system has them.
            path.open("x").close()
        os.replace(partial, path)
    except XarchError:
        raise
    except Exception as error:
        if not overwrite and isinstance(error, FileExistsError):
            raise _exists(path) from None
        # safetensors raises an error of its own for a full disk, and torch.save a RuntimeError.
        raise cannot_write(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, overwrite: bool = True) -> None:
    """Write `text` in UTF-8; errors as in `write_file`."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"), overwrite=overwrite)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON that ends with a newline; errors as in `write_file`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors`, of any device, as safetensors with `metadata` and their checksum; errors as in `write_file`."""
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = dict(metadata or {})
    described[CHECKSUM] = _checksum(on_cpu, described)
    write_file(path, lambda partial: save_file(on_cpu, partial, described))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a file by `write_tensors`.

    Raises CheckpointError if the file is missing, cut short, or not bit for bit what was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read", asked=path, found=str(error) or type(error).__name__
        ) from None
    written = metadata.pop(CHECKSUM, None)
    if written is None:
        raise CheckpointError(
            f"{path.name} has no checksum, so that damage to it would not be seen",
            asked=path,
            found="a file of an earlier version of xarch_kd, or of another program",
            fix="run again with another --output",
        )
    if written != (found := _checksum(tensors, metadata)):
        raise CheckpointError(
            f"{path.name} is damaged: its content is not what was written",
            asked=path,
            found=f"checksum {found[:12]}",
            allowed=written[:12],
        )
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of names, shapes, dtypes and bytes of tensors on the CPU, and of metadata."""
    import torch

    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]  # numpy's stubs lack __buffer__
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write the checksums of all other files of a folder, the last of its files. Raises CheckpointError."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUM_FILE)
    write_json(folder / CHECKSUM_FILE, {"files": {str(path.relative_to(folder)): sha256_of(path) for path in files}})


def seal_again(folder: Path, *written: Path) -> None:
    """Put files of a sealed folder that were just written into its checksums; all others keep theirs.

    Raises CheckpointError for damaged checksums.
    """
    own = {str(path.relative_to(folder)): sha256_of(path) for path in written}
    write_json(folder / CHECKSUM_FILE, {"files": dict(sorted({**checksums(folder), **own}.items()))})


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a sealed folder. Raises CheckpointError if they are missing or damaged."""
    try:
        digests = json.loads((folder / CHECKSUM_FILE).read_text(encoding="utf-8"))["files"]
        return {str(name): str(digest) for name, digest in digests.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{CHECKSUM_FILE} is missing", asked=folder) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{CHECKSUM_FILE} is damaged", asked=folder) from None


def damages_of(folder: Path, digests: Mapping[str, str]) -> Iterator[str]:
    """Yield one line for each file of `digests` that is missing in a folder or not as it was written."""
    for name, digest in digests.items():
        try:
            if sha256_of(folder / name) != digest:
                yield f"{name} is damaged"
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            yield f"{name} is missing" if missing else f"{name} cannot be read: {error.strerror}"


def damage_of(folder: Path) -> str | None:
    """Return the first file of a sealed folder that is missing or not as it was written, None if it is whole."""
    try:
        return next(damages_of(folder, checksums(folder)), None)
    except CheckpointError as error:
        return error.message


def check_sealed(folder: Path) -> None:
    """Raise CheckpointError for the first file of a folder that is not as its `checksums.json`, if any, lists it.

    The model card is not compared, since nothing is loaded from it.
    """
    if not (folder / CHECKSUM_FILE).exists():
        return
    digests = {name: digest for name, digest in checksums(folder).items() if name != "README.md"}
    for damage in damages_of(folder, digests):
        raise CheckpointError(
            f"{damage}: the model is not what was written",
            asked=folder,
            allowed=f"files as {CHECKSUM_FILE} lists them",
            fix=f"restore it from a copy; if you changed it on purpose, delete {folder / CHECKSUM_FILE}",
        )


def write_folder(folder: Path, write: Callable[[Path], object], *, overwrite: bool = False) -> Path:
    """Call `write` with a name beside `folder`, rename the folder that it makes to `folder`, and return `folder`.

    Raises UsageError if `folder` holds something and `overwrite` is False, CheckpointError if it cannot be written.
    """
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} already holds something.", fix="name a new folder, or allow it to be overwritten")
    scratch: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        write(scratch / "new")
        if folder.exists():
            folder.rename(scratch / "old")
        (scratch / "new").rename(folder)
    except Exception as error:
        if scratch is not None and (scratch / "old").exists() and not folder.exists():
            (scratch / "old").rename(folder)
        raise error if isinstance(error, XarchError) else cannot_write(folder, error) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def cannot_write(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a file or folder that could not be written: the reason, and that older files are intact."""
    is_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    is_inside = isinstance(error, OSError) or "os error" in str(error)
    repeat = "repeat the command (a training run: with --resume); files that were written before are intact"
    first = "free some space" if is_full else "check that the folder exists and is writable" if is_inside else None
    return CheckpointError(
        f"cannot write {path.name}",
        asked=path,
        found="no space left on the disk" if is_full else str(error) or type(error).__name__,
        fix=f"{first}, then {repeat}" if first else "files that were written before are intact",
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(path: Path) -> UsageError:
    return UsageError("the file exists and is left as it is", asked=path, fix="give another --output")
