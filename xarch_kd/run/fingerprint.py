"""Fingerprint of a run: hashes of all that it is made from, recorded when it starts and compared when it resumes."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xarch_kd.errors import UsageError

# Packages whose releases change the numbers of a run: formulas, kernels, model classes, tokens.
PACKAGES: Final = ("xarch_kd", "torch", "transformers", "tokenizers", "datasets", "accelerate")
ABSENT: Final = "absent"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """All that a run is made from: a hash or commit of each of its `inputs`, and the versions of `packages`.

    `working_directory` is where relative paths of the mapping file start; it is recorded and not compared.
    """

    inputs: Mapping[str, str]
    packages: Mapping[str, str]
    working_directory: str

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "inputs": dict(self.inputs),
            "packages": dict(self.packages),
            "working_directory": self.working_directory,
        }

    @classmethod
    def from_dict(cls, stored: Any) -> Fingerprint | None:
        """Return the fingerprint that `as_dict` came from, None if `stored` is something else."""
        try:
            inputs, packages = (
                {str(name): str(value) for name, value in stored[key].items()} for key in ("inputs", "packages")
            )
            return cls(inputs=inputs, packages=packages, working_directory=str(stored["working_directory"]))
        except (TypeError, KeyError, AttributeError):
            return None


def installed_packages() -> dict[str, str]:
    """Return the versions of the packages that a fingerprint covers, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def changed_inputs(recorded: Fingerprint, found: Fingerprint) -> list[str]:
    """Return one line for each input that differs, with its value at the start of the run and now."""
    return _changes(recorded.inputs, found.inputs)


def changed_releases(recorded: Fingerprint, found: Fingerprint) -> list[str]:
    """Return one line for each package of another major or minor version, which may compute other numbers."""
    return _changes(
        *({name: _release(version) for name, version in side.packages.items()} for side in (recorded, found))
    )


def changed_patches(recorded: Fingerprint, found: Fingerprint) -> list[str]:
    """Return one line for each package of the same release whose patch version or build differs."""
    same = {
        name
        for name, version in recorded.packages.items()
        if _release(version) == _release(found.packages.get(name, ""))
    }
    return _changes(
        *({name: version for name, version in side.packages.items() if name in same} for side in (recorded, found))
    )


def changed_values(before: Any, now: Any) -> list[str]:
    """Return one line for each key of two JSON objects whose values differ, e.g. of a mapping file."""
    return _changes(*(dict(_flattened(value, "")) for value in (before, now)))


def _flattened(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _flattened(entry, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple) and value:
        for index, entry in enumerate(value):
            yield from _flattened(entry, f"{place}[{index}]")
    else:
        yield place, json.dumps(value, ensure_ascii=False, default=str)


def check_unchanged(recorded: Fingerprint | None, found: Fingerprint, *, folder: Path, finished: bool) -> None:
    """Raise UsageError, naming every difference, unless a run's inputs are those that it was started with.

    An unfinished run also needs the packages in the same major and minor version: the steps to come are computed by
    them. `recorded` is None for a folder of a version that recorded no inputs.
    """
    if recorded is None:
        raise UsageError(
            "the run folder does not record what the run was made from, so it cannot be compared with these inputs",
            asked=folder,
            found="a plan.json without the hashes of text, tokenizer and models: an older version wrote it",
            fix="train again with another --output; nothing was changed",
        )
    lines = changed_inputs(recorded, found)
    if not finished:
        lines += changed_releases(recorded, found)
    if not lines:
        return
    again = "train what is there now with another --output"
    raise UsageError(
        "the finished run in the output folder was made from other inputs than these"
        if finished
        else f"the run cannot be resumed: {len(lines)} of the things that it is made from changed since it started",
        asked=folder,
        found="\n           ".join(lines),
        fix=f"{again}, or restore what changed{'' if finished else ' and resume'}; nothing was changed",
    )


def check_recorded(recorded: Fingerprint | None, found: Mapping[str, str], *, folder: Path) -> None:
    """Raise UsageError, naming every difference, unless these inputs of a finished run are those it was made from.

    Only the inputs in `found` are compared; nothing is where the run recorded none.
    """
    if recorded is None:
        return
    prefixes = {name.split(",")[0] for name in found}
    before = {name: value for name, value in recorded.inputs.items() if name.split(",")[0] in prefixes}
    lines = _changes(before, found)
    if lines:
        raise UsageError(
            "the run was made from other inputs than those that its mapping file names now",
            asked=folder,
            found="\n           ".join(lines),
            fix=f"restore what changed; relative paths start at {recorded.working_directory}, if that folder exists, "
            "and else at the working directory. Nothing was written.",
        )


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    names: Iterable[str] = dict.fromkeys([*before, *now])
    return [
        f"{name}: {before.get(name, ABSENT)} at the start, {now.get(name, ABSENT)} now"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _release(version: str) -> str:
    """Return major and minor version, e.g. `2.13` of `2.13.0+cpu`."""
    return ".".join(version.split("+")[0].split(".")[:2])
