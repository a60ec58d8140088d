"""What parts of a mapping file are made of: the parent of all, and scalars with their ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: object) -> object:
    """Return an integer as the float it stands for: strict floats would refuse `weight: 1`."""
    return float(value) if type(value) is int and abs(value) < 2**63 else value


Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]
LayerIndex = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """Parent of every part of a mapping file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
