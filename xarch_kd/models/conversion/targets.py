"""Table of the stock student classes, with the teachers that each can represent; choice of the class for `auto`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedConfig

from xarch_kd.errors import ConversionError, check_table
from xarch_kd.models.conversion.activation_stats import ActivationStats
from xarch_kd.models.conversion.bamba import bamba_config, bamba_state, bamba_unsupported_reason, mamba2_state
from xarch_kd.models.conversion.granitemoehybrid import (
    granitemoehybrid_config,
    granitemoehybrid_state,
    granitemoehybrid_unsupported_reason,
    unscaled,
)
from xarch_kd.models.conversion.olmo_hybrid import (
    olmo_hybrid_config,
    olmo_hybrid_mixer,
    olmo_hybrid_norms,
    olmo_hybrid_state,
    olmo_hybrid_unsupported_reason,
)
from xarch_kd.models.conversion.qwen3_5 import qwen3_5_config, qwen3_5_mixer, qwen3_5_state, qwen3_5_unsupported_reason
from xarch_kd.models.conversion.recipes import RECIPES
from xarch_kd.models.conversion.teacher_spec import TeacherSpec, or_in_place
from xarch_kd.models.conversion.weights import BlockWeights, TeacherWeights

# Exactness of a student with all attention kept, best first: the same weights; multipliers folded into weights, which
# differs by rounding; exact only while some weights stay frozen.
Fit = Literal["exact", "folded", "frozen"]
FITS: tuple[Fit, ...] = ("exact", "folded", "frozen")


def _as_given(spec: TeacherSpec) -> TeacherSpec:
    return spec


def _folds(spec: TeacherSpec) -> Fit:
    return "folded" if spec.is_folded else "exact"


def _always_exact(spec: TeacherSpec) -> Fit:
    return "exact"


def _with_norms(spec: TeacherSpec) -> Fit:
    return "frozen" if spec.query_key_norm is None else _folds(spec)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Student class: `unsupported_reason` returns why it cannot represent a teacher, `fit` how exactly it does.

    `read_as` returns the spec for reading the teacher's weights: without the multipliers that the class has itself.
    `config` and `state` return its config and all weights except those of its mixers. `mixer_state` names the
    weights of a recipe's mixer in the block at a place, with the other weights that differ there; with `needs_stats`
    it reads the activation statistics of the teacher's block.
    """

    name: str
    mixer: str
    unsupported_reason: Callable[[TeacherSpec], str | None]
    fit: Callable[[TeacherSpec], Fit]
    read_as: Callable[[TeacherSpec], TeacherSpec] = _as_given
    config: Callable[[TeacherSpec, Sequence[int], PreTrainedConfig], PreTrainedConfig]
    state: Callable[[TeacherWeights, Sequence[int]], dict[str, Tensor]]
    mixer_state: Callable[[str, dict[str, Tensor], BlockWeights, ActivationStats | None], dict[str, Tensor]]
    needs_stats: bool = False


def _qwen3_5_block(
    place: str, mixer: dict[str, Tensor], block: BlockWeights, stats: ActivationStats | None
) -> dict[str, Tensor]:
    return qwen3_5_mixer(place, mixer)


def _olmo_hybrid_block(
    place: str, mixer: dict[str, Tensor], block: BlockWeights, stats: ActivationStats | None
) -> dict[str, Tensor]:
    assert stats is not None
    return olmo_hybrid_mixer(place, mixer) | olmo_hybrid_norms(place, block, stats)


# Of two classes that fit equally well, `auto` selects the first: servers run GraniteMoeHybrid, and no longer Bamba.
TARGETS: dict[str, Target] = {
    "granitemoehybrid": Target(
        name="granitemoehybrid",
        mixer="mamba2",
        unsupported_reason=granitemoehybrid_unsupported_reason,
        fit=_always_exact,
        read_as=unscaled,
        config=granitemoehybrid_config,
        state=granitemoehybrid_state,
        mixer_state=mamba2_state,
    ),
    "bamba": Target(
        name="bamba",
        mixer="mamba2",
        unsupported_reason=bamba_unsupported_reason,
        fit=_folds,
        config=bamba_config,
        state=bamba_state,
        mixer_state=mamba2_state,
    ),
    "qwen3_5": Target(
        name="qwen3_5",
        mixer="gated_delta",
        unsupported_reason=qwen3_5_unsupported_reason,
        fit=_with_norms,
        config=qwen3_5_config,
        state=qwen3_5_state,
        mixer_state=_qwen3_5_block,
    ),
    "olmo_hybrid": Target(
        name="olmo_hybrid",
        mixer="gated_delta",
        unsupported_reason=olmo_hybrid_unsupported_reason,
        fit=_always_exact,
        config=olmo_hybrid_config,
        state=olmo_hybrid_state,
        mixer_state=_olmo_hybrid_block,
        needs_stats=True,
    ),
}

check_table("mixers of student classes", {target.mixer for target in TARGETS.values()}, RECIPES)


def choose_target(spec: TeacherSpec, *, mixer: str, target: str) -> Target:
    """Return the class that `target` names; for `auto` that of the best fit, of equal ones the first in `TARGETS`.

    Raises `ConversionError` for names that do not exist or do not go together, and for a teacher that the class, or
    every class with this mixer, cannot hold.
    """
    if mixer not in RECIPES:
        raise ConversionError("There is no conversion to this mixer.", asked=mixer, allowed=", ".join(RECIPES))
    if target != "auto" and target not in TARGETS:
        raise ConversionError(
            "There is no conversion to this class.", asked=target, allowed=f"auto, {', '.join(TARGETS)}"
        )
    if target != "auto" and TARGETS[target].mixer != mixer:
        raise ConversionError(
            f"The class {target} has no mixers of this kind.",
            asked=f"mixer: {mixer}, target: {target}",
            allowed=f"auto, {', '.join(name for name, one in TARGETS.items() if one.mixer == mixer)}",
            fix=f"mixer: {TARGETS[target].mixer}",
        )
    asked = [TARGETS[target]] if target != "auto" else [one for one in TARGETS.values() if one.mixer == mixer]
    able = [one for one in asked if one.unsupported_reason(spec) is None]
    if not able:
        reasons = "; ".join(f"{one.name}: {one.unsupported_reason(spec)}" for one in asked)
        raise ConversionError(
            f"A teacher of type {spec.model_type} cannot become {' or '.join(one.name for one in asked)}.",
            asked=f"model_type: {spec.model_type}, mixer: {mixer}, target: {target}",
            found=reasons,
            fix=_instead(spec),
        )
    return min(able, key=lambda one: FITS.index(one.fit(spec)))


def _instead(spec: TeacherSpec) -> str:
    able = [one for one in TARGETS.values() if one.unsupported_reason(spec) is None]
    able.sort(key=lambda one: FITS.index(one.fit(spec)))
    fresh = "build a fresh student (student: {config: FOLDER}) and align it, which needs no conversion"
    others = or_in_place(spec.model_type, fresh)
    return others if not able else f"mixer: {able[0].mixer}, target: {able[0].name} holds this teacher; or {others}"
