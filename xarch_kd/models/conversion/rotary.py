"""Rotary positions of stock student classes, which have one switch for all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xarch_kd.errors import ConversionError
from xarch_kd.models.conversion.teacher_spec import TeacherSpec, or_in_place


def is_rotary(spec: TeacherSpec, kept: Sequence[int]) -> bool:
    """Return whether the kept blocks rotate queries and keys; True if none is kept.

    Raises `ConversionError` if they do not agree: every stock hybrid class has one switch for all of its blocks.
    """
    rotary = {spec.rotary_layers[index] for index in kept}
    if rotary == {True, False}:
        without = [index for index in kept if not spec.rotary_layers[index]]
        raise ConversionError(
            "The kept blocks mix attention with and without rotary positions; a stock class has one switch for all.",
            asked=f"keep attention in {list(kept)}",
            found=f"blocks without rotary positions: {without} of {list(kept)}",
            fix=or_in_place(
                spec.model_type,
                "keep only blocks with them, or only blocks without: "
                f"{[index for index in range(spec.layers) if spec.rotary_layers[index]]} or "
                f"{[index for index in range(spec.layers) if not spec.rotary_layers[index]]}",
            ),
        )
    return rotary != {False}


def rotary_parameters(spec: TeacherSpec, kept: Sequence[int]) -> dict[str, Any]:
    """Return the student's `rope_parameters`, always with the rotated fraction of a head.

    The classes' defaults for that fraction differ: a half (Bamba), a quarter (Qwen3.5).
    """
    if is_rotary(spec, kept):
        return dict(spec.rope_parameters)
    # In the shared rotary utilities this leaves every frequency zero, so that no channel is rotated.
    theta = spec.rope_parameters["rope_theta"]
    return {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": 0.0}
