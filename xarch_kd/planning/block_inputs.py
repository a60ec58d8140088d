"""Inputs of the student's blocks under `inputs: teacher`, and the rule by which a mixer runs without its block."""

from __future__ import annotations

from collections.abc import Iterable

from xarch_kd.mapping_file.schema import Stage
from xarch_kd.taps.sites import MIXER_TAPS, Site


def runs_mixers_alone(stage: Stage, taps: Iterable[str]) -> bool:
    """Return true if mixers run without their blocks, for the `taps` that are compared.

    Only what a mixer computes is compared, and nothing outside the mixers trains.
    """
    trains_mixers = stage.lora is None and set(stage.parts) == {"mixers"}
    return stage.inputs == "teacher" and set(taps) <= MIXER_TAPS and trains_mixers


def block_input(stage: Stage, taps: Iterable[str], teacher_layer: int | None) -> Site:
    """Return the teacher's site whose feature is the input of a student block, or of its mixer alone.

    `taps` are those at which the student block is compared, `teacher_layer` the block that it is compared with.
    """
    layer = teacher_layer or 0
    if runs_mixers_alone(stage, taps):
        return Site("mixer_input", layer)
    return Site("hidden", layer - 1) if layer else Site("embedding", None)
