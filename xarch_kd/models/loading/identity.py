"""Identity of a model's files: the commit of a hub model, size and hash of each file of a local one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from transformers.utils.hub import cached_file, extract_commit_hash

from xarch_kd.errors import ModelError
from xarch_kd.models.loading.reference import Source, read_config_json, resolve
from xarch_kd.models.loading.stored import INDEX, stored_tensors
from xarch_kd.models.mamba_ssm.config import is_mamba_ssm

# Files up to this size are hashed whole; of a larger one both ends, the start of each tensor and samples at this
# distance, so that the cost stays seconds for hundreds of gigabytes.
WHOLE_BYTES: Final = 64 * 2**20
END_BYTES: Final = 2**20
SAMPLE_BYTES: Final = 4096
SAMPLE_DISTANCE: Final = 256 * 1024
SHOWN_DIGITS: Final = 16


def model_identity(reference: str, revision: str | None = None) -> dict[str, str]:
    """Return what identifies a model by file name: size and SHA-256 of each file, or the `commit` of a hub model.

    Of files above 64 MiB the hash covers samples: both ends, 4 KiB at the start of each tensor and of every 256 KiB. It
    sees training of any part of the model, but not a change of single values between the samples. Raises `ModelError`.
    """
    source = resolve(reference, revision)
    if source.path is None:
        return {"commit": _commit(source)}
    if source.kind == "gguf":
        return {source.path.name: file_identity(source.path)}
    config = source.path / "config.json"
    if is_mamba_ssm(read_config_json(source.path)):
        weights = sorted(path for pattern in ("*.bin", "*.safetensors") for path in source.path.glob(pattern))
        return {path.name: file_identity(path) for path in (config, *weights)}
    starts: dict[Path, list[int]] = {}
    for stored in stored_tensors(source.path).values():
        starts.setdefault(stored.file, []).append(stored.start)
    index = source.path / INDEX
    small = {path.name: file_identity(path) for path in (config, index) if path.is_file()}
    return small | {path.name: file_identity(path, starts[path]) for path in sorted(starts)}


def config_identity(reference: str) -> dict[str, str]:
    """Return what identifies the config of a student that is built fresh: a file's hash, or the commit on the hub."""
    path = Path(reference).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return {"config.json": file_identity(file)}
    return {"commit": _commit(resolve(reference))}


def file_identity(path: Path, starts: Iterable[int] = ()) -> str:
    """Return size and SHA-256 of a file, of a large one by samples, also at the offsets `starts`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return _shown(size, hashlib.file_digest(file, "sha256").hexdigest())
        digest = hashlib.sha256(file.read(END_BYTES))
        for position in sorted({*range(0, size, SAMPLE_DISTANCE), *starts}):
            file.seek(position)
            digest.update(file.read(SAMPLE_BYTES))
        file.seek(size - END_BYTES)
        digest.update(file.read())
    return _shown(size, digest.hexdigest())


def _shown(size: int, digest: str) -> str:
    return f"{size:,} bytes, sha256 {digest[:SHOWN_DIGITS]}"


def _commit(source: Source) -> str:
    """Return the commit that a revision is now, from the folder of the hub's cache that its config lies in."""
    try:
        config = cached_file(source.name, "config.json", revision=source.revision)
    except (OSError, ValueError) as error:
        raise ModelError("The model could not be found on the hub.", asked=source.name, found=error) from error
    commit = extract_commit_hash(config, None)
    if commit is None:
        raise ModelError(
            "The commit of the hub model is not known, so a later change of it could not be seen.",
            asked=source.name,
            found=f"config.json at {config}",
            fix=f"download it, e.g. hf download {source.name} --local-dir FOLDER, and name the folder",
        )
    return commit
