"""Mapping files given as Python values: the checks and messages of a YAML file, without lines and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml
from pydantic import BaseModel

from xarch_kd.errors import UsageError
from xarch_kd.mapping_file.load import validate_mapping
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.mapping_file.source_map import Problem, YamlPath, shortened
from xarch_kd.mapping_file.yaml_core import LARGEST_INTEGER, MAXIMUM_DEPTH, CoreLoader, is_encodable

PLAIN = "text, numbers, True, False, None, lists, tuples and dicts"


def mapping_from(value: object) -> MappingFile:
    """Return the mapping file that a dict, or a `MappingFile` built in Python, holds; lists and tuples are alike.

    Raises `MappingFileError` with every problem as `mapping: place: problem`, and `UsageError` for another type.
    """
    if not isinstance(value, MappingFile | Mapping):
        raise UsageError(
            "This is not a mapping file.",
            found=type(value).__name__,
            allowed="the path of a YAML file (str or Path), a dict, or an xarch_kd.MappingFile",
        )
    problems: list[Problem] = []
    plain = _plain(value, (), problems)
    return validate_mapping(plain, problems, None)


def mapping_as_yaml(mapping: MappingFile) -> str:
    """Return a mapping file as YAML text that reads back as the same one."""
    return yaml.dump(mapping.model_dump(mode="json", exclude_unset=True), Dumper=_CoreDumper, sort_keys=False)


def _plain(value: Any, place: YamlPath, problems: list[Problem]) -> Any:
    """Return `value` as the YAML reader would: dicts with text keys, lists as tuples, plain scalars."""
    if isinstance(value, BaseModel):
        # Of a model that was built without validation (model_construct, model_copy) the values are checked again.
        value = value.model_dump(exclude_unset=True, warnings=False)
    if len(place) > MAXIMUM_DEPTH:
        problems.append(Problem(place[:3], f"nested deeper than {MAXIMUM_DEPTH} levels"))
        return None
    if isinstance(value, Mapping):
        return _plain_dict(value, place, problems)
    if isinstance(value, list | tuple | range):
        return tuple(_plain(item, (*place, index), problems) for index, item in enumerate(value))
    return _plain_scalar(value, place, problems)


def _plain_dict(value: Mapping[Any, Any], place: YamlPath, problems: list[Problem]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str) or not is_encodable(key):
            problems.append(Problem(place, f"a key must be text, found {shortened(repr(key))}"))
        else:
            result[str(key)] = _plain(item, (*place, str(key)), problems)
    return result


def _plain_scalar(value: Any, place: YamlPath, problems: list[Problem]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, str):
        if is_encodable(value):
            return str(value)
        problems.append(Problem(place, "holds half of a surrogate pair, which is no character"))
        return ""
    if isinstance(value, int):
        if abs(value) > LARGEST_INTEGER:
            problems.append(Problem(place, f"the number is too large: at most {LARGEST_INTEGER}"))
            return 0
        return int(value)
    if isinstance(value, float):
        return float(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    message = f"must be a plain value, found {shortened(kind)}. Allowed are {PLAIN}."
    if hasattr(value, "item") and not isinstance(value, Sequence):
        message += " Pass value.item() or value.tolist()."
    problems.append(Problem(place, message))
    return None


class _CoreDumper(yaml.SafeDumper):
    """Writes text in quotes where YAML 1.1 or the core schema would read it as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # an attribute of PyYAML's class
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
            *CoreLoader.yaml_implicit_resolvers.get(first, ()),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *CoreLoader.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Return true: a mapping file has no aliases."""
        return True
