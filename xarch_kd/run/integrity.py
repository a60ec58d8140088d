"""Checks of all files of a run, or of a student on its own, against the hashes that were written with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.files import CHECKSUM_FILE, checksums, damages_of, read_tensors

MANIFEST: Final = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of a check: what the folder is, how many files were compared, and one line per file that is damaged.

    `unlisted` are files without a hash; `resumes_from` is the newest whole checkpoint of an unfinished run.
    """

    folder: Path
    kind: Literal["finished run", "unfinished run", "student"]
    compared: int
    damage: tuple[str, ...]
    unlisted: tuple[str, ...]
    resumes_from: str | None = None


def verify_folder(folder: Path) -> Verification:
    """Compare every file of a run or a student with its hash. Raises UsageError for a folder without hashes."""
    if (folder / MANIFEST).is_file():
        return _sealed(folder, "finished run", MANIFEST)
    if (folder / "plan.json").is_file():
        return _unfinished(folder)
    if (folder / CHECKSUM_FILE).is_file():
        return _sealed(folder, "student", CHECKSUM_FILE)
    raise UsageError(
        "there is nothing to compare the files with",
        asked=folder,
        found="no such folder" if not folder.is_dir() else f"neither {MANIFEST} nor {CHECKSUM_FILE}",
        allowed="a run folder, or a student that xarch-kd wrote",
    )


def _sealed(folder: Path, kind: Literal["finished run", "student"], marker: str) -> Verification:
    try:
        digests = _manifest(folder) if marker == MANIFEST else checksums(folder)
    except CheckpointError as error:
        return Verification(folder=folder, kind=kind, compared=0, damage=(error.message,), unlisted=())
    unlisted = tuple(name for name in _files(folder) if name not in digests and name not in (marker, "run.lock"))
    return Verification(
        folder=folder,
        kind=kind,
        compared=len(digests),
        damage=tuple(damages_of(folder, digests)),
        unlisted=unlisted,
    )


def _unfinished(folder: Path) -> Verification:
    """Compare the files of finished stages and of checkpoints; others have no hash before the run is finished."""
    damage: list[str] = []
    compared: set[str] = set()
    resumes_from = None
    for path in sorted(folder.glob("stages/*/trained.safetensors")):
        name = str(path.relative_to(folder))
        compared.add(name)
        try:
            read_tensors(path)
        except CheckpointError as error:
            damage.append(f"{name}: {error.message}")
    checkpoints = sorted(folder.glob("stages/*/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in [*checkpoints, *([folder / "student"] if (folder / "student").is_dir() else [])]:
        name = str(path.relative_to(folder))
        try:
            digests = checksums(path)
        except CheckpointError as error:
            damage.append(f"{name}/{error.message}")
            continue
        compared.update(f"{name}/{each}" for each in (*digests, CHECKSUM_FILE))
        wrong = [f"{name}/{line}" for line in damages_of(path, digests)]
        damage += wrong
        resumes_from = name if not wrong and path in checkpoints else resumes_from
    return Verification(
        folder=folder,
        kind="unfinished run",
        compared=len(compared),
        damage=tuple(damage),
        unlisted=tuple(name for name in _files(folder) if name not in compared and name != "run.lock"),
        resumes_from=resumes_from,
    )


def _manifest(folder: Path) -> dict[str, str]:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): str(digest) for name, digest in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{MANIFEST} is damaged", asked=folder) from None


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] != "wandb":
            yield str(name)
