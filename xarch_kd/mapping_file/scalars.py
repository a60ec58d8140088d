"""Base class of the parts of a mapping file, and scalar types with ranges."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: object) -> object:
    """Return an integer as a float: strict floats would refuse `weight: 1`."""
    return float(value) if type(value) is int and abs(value) < 2**63 else value


Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]
LayerIndex = Annotated[int, Field(ge=0)]


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Return a config's values. Raises `ValueError` unless they are text, numbers, truth values, lists and mappings."""
    for key, item in value.items():
        inner = list(item) if isinstance(item, list | tuple) else [item]
        for entry in inner:
            if isinstance(entry, dict):
                _plain(entry)
            elif not isinstance(entry, str | int | float | None):
                raise ValueError(f"{key} is neither text, a number, true, false, a list nor a mapping")
            elif isinstance(entry, float) and math.isnan(entry):
                raise ValueError(f"{key} is not a number")
    return value


ConfigValues = Annotated[dict[str, Any], AfterValidator(_plain)]


class ConfigModel(BaseModel):
    """Parent of every part of a mapping file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def kinds_of(options: Iterable[type[ConfigModel]]) -> tuple[str, ...]:
    """Return the names that select these options: the values of their `kind` or `strategy`."""
    found: list[str] = []
    for part in options:
        tag = part.model_fields["kind" if "kind" in part.model_fields else "strategy"]
        found += get_args(tag.annotation)
    return tuple(found)
