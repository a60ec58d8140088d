"""Support for every model type, determined by running the code: the rows of docs/families.md.

A row is a tiny model. A cell has what works, or the message of the error for what does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import XarchError
from xarch_kd.models.conversion.convert import IN_PLACE, convert, plan_conversion
from xarch_kd.models.conversion.epsilon import with_epsilon
from xarch_kd.models.conversion.targets import TARGETS, Fit, choose_target
from xarch_kd.models.conversion.teacher_spec import REFUSALS, SPECS, teacher_spec
from xarch_kd.models.in_place.teachers import IN_PLACE_TEACHERS
from xarch_kd.models.mamba_ssm.config import EPSILON, WRITERS, mamba_ssm_config
from xarch_kd.models.serving import Served, served_by
from xarch_kd.taps.families import FAMILIES, IN_PLACE_PREFIX
from xarch_kd.taps.layout import Layout, layout_of
from xarch_kd.taps.mixings import mixing_tap
from xarch_kd.taps.sites import TAPS, sites_of
from xarch_kd.taps.trace import trace
from xarch_kd.testing import recurrent, tiny

LENGTH = 13
CONVERSIONS: dict[str, tuple[str, ...]] = {
    mixer: (*(name for name, target in TARGETS.items() if target.mixer == mixer), IN_PLACE)
    for mixer in ("mamba2", "gated_delta")
}


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """Tiny model of a row; `overrides` are the config fields that distinguish it from others of its type."""

    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    # Fields that only make the model tiny; not part of the row's name.
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The type and its overrides, e.g. `mistral, sliding_window: 8`."""
        return ", ".join([self.model_type, *(f"{key}: {_short(value)}" for key, value in self.overrides.items())])

    def model(self) -> PreTrainedModel:
        """Return a new model, equal in each call."""
        overrides = {**self.sizes, **self.overrides}
        teacher = self.model_type.removeprefix(IN_PLACE_PREFIX)
        if teacher != self.model_type:
            return convert(tiny.tiny_model(teacher, **overrides), replace=[0], check=False, target="in_place")
        builds = tiny.tiny_model if self.model_type in tiny.SIZES else recurrent.recurrent_model
        return builds(self.model_type, **overrides)


def _short(value: object) -> str:
    """Return a field's value as text; of rotary parameters only those that are not the default."""
    if not isinstance(value, Mapping):
        return str(value).lower() if isinstance(value, bool) else str(value)
    kind, share = value["rope_type"], value.get("partial_rotary_factor", 1.0)
    return kind if share == 1.0 else f"a share of {share}"


VARIANTS = (
    Specimen(model_type="llama", overrides={"rope_parameters": tiny.LLAMA3}),
    Specimen(model_type="llama", overrides={"attention_bias": True, "mlp_bias": True}),
    Specimen(model_type="llama", overrides={"head_dim": 24}),
    Specimen(model_type="mistral", overrides={"sliding_window": 8}),
    Specimen(
        model_type="qwen3", overrides={"use_sliding_window": True, "sliding_window": 8}, sizes={"max_window_layers": 1}
    ),
    Specimen(model_type="phi3", overrides={"rope_parameters": tiny.PARTIAL}),
    Specimen(model_type="gpt_neox", overrides={"use_parallel_residual": False}),
    Specimen(model_type="granite", overrides={"tie_word_embeddings": True}),
)
# Sizes that give a tiny model a mixer of each kind of its family, or an epsilon that mamba_ssm's format holds.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "nemotron_h": {"layers_block_type": ["mamba", "mlp", "attention"], "num_hidden_layers": 3},
    "granitemoehybrid": {"rms_norm_eps": EPSILON},
}


def _specimens() -> Iterator[Specimen]:
    for model_type in sorted(FAMILIES, key=lambda name: (name not in {*SPECS, *REFUSALS}, name)):
        yield Specimen(model_type=model_type, sizes=OWN_SIZES.get(model_type, {}))
        yield from (variant for variant in VARIANTS if variant.model_type == model_type)
    for model_type in IN_PLACE_TEACHERS:
        yield Specimen(model_type=f"{IN_PLACE_PREFIX}{model_type}")


SPECIMENS: dict[str, Specimen] = {specimen.name: specimen for specimen in _specimens()}


@dataclass(frozen=True, kw_only=True)
class ConversionSupport:
    """Conversion of a teacher to one student class, and its exactness.

    `fit` is None if the conversion is refused, with `reason`. `notes` are its warnings; `chosen` is true for the class
    that `target: auto` selects. `all_kept` is the reason if not all of the attention can be kept.
    """

    fit: Fit | None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    chosen: bool = False
    all_kept: str | None = None


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export to mamba_ssm of a model, or of the student that `target: auto` gives; `reason` if it is refused.

    `rescaled` is the reason if its norms need another epsilon first.
    """

    by_way_of: str | None = None
    reason: str | None = None
    rescaled: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """Support for one specimen.

    `missing` has the reason for each tap that it does not have, `mixings` the class of the tap `mixing` for each kind
    of mixer, `unread` the reason if there is none, and `conversions` one item per (mixer, target). `served` has the
    servers for the model's own class and for the students that `target: auto` gives, by class.
    """

    name: str
    mixers: tuple[str, ...]
    missing: Mapping[str, str]
    mixings: Mapping[str, str]
    unread: Mapping[str, str]
    conversions: Mapping[tuple[str, str], ConversionSupport]
    export: Export
    served: Mapping[str, Mapping[str, Served]]


def row_of(specimen: Specimen) -> Row:
    """Return the row of a specimen; only its tiny model runs, nothing is trained."""
    model = specimen.model()
    layout = layout_of(model)
    mixings, unread = _mixings(layout)
    return Row(
        name=specimen.name,
        mixers=tuple(dict.fromkeys(layout.mixer_kinds)),
        missing={tap: reason for tap in TAPS if tap != "mixing" and (reason := _missing(layout, tap)) is not None},
        mixings=mixings,
        unread=unread,
        conversions={
            (mixer, target): conversion_of(model.config, mixer, target)
            for mixer, targets in CONVERSIONS.items()
            for target in targets
        },
        export=export_of(model),
        served=served_of(model.config),
    )


def in_short(error: XarchError) -> str:
    """Return the reason in an error, verbatim: the objection of a single target, or the text after the colon."""
    target, _, against = str(error.found).partition(": ")
    if target in TARGETS and "; " not in against:
        return against
    return error.message.split(": ", 1)[-1].rstrip(".")


def token_ids() -> Tensor:
    """Return token ids [batch, time] that are valid for every specimen."""
    return torch.randint(1, tiny.VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def readable_layers(layout: Layout) -> dict[int, str | None]:
    """Return the reason why the mixing of each block cannot be read, or None."""
    reasons: dict[int, str | None] = {}
    for layer in range(len(layout.blocks)):
        try:
            mixing_tap(layout, layer)
        except XarchError as error:
            reasons[layer] = in_short(error)
        else:
            reasons[layer] = None
    return reasons


def conversion_of(config: PreTrainedConfig, mixer: str, target: str) -> ConversionSupport:
    """Return the conversion of a teacher of `config` to `target` with the mixer of its last block replaced."""
    replaced = [int(config.num_hidden_layers) - 1]  # type: ignore[attr-defined]  # a field of every family's config
    try:
        notes = plan_conversion(config, mixer=mixer, target=target, replace=replaced).warnings
    except XarchError as error:
        return ConversionSupport(fit=None, reason=in_short(error))
    all_kept = _all_kept(config, mixer, target)
    if target == IN_PLACE:
        return ConversionSupport(fit="exact", notes=notes, all_kept=all_kept)
    spec = teacher_spec(config)
    chosen = choose_target(spec, mixer=mixer, target="auto").name == target
    fit = TARGETS[target].fit(spec)
    return ConversionSupport(fit=fit, notes=notes, chosen=chosen, all_kept=all_kept)


def export_of(model: PreTrainedModel) -> Export:
    """Return the export of a model to mamba_ssm, as it is or with the mixer of its last block replaced."""
    converted = _converted(model.config)
    if model.config.model_type in WRITERS or converted is None:
        return Export(reason=_unwritten(model.config))
    by_way_of, reason = converted.model_type, _unwritten(converted)
    if reason is None:
        return Export(by_way_of=by_way_of)
    rescaled = _converted(with_epsilon(model, EPSILON).config)
    assert rescaled is not None
    return Export(by_way_of=by_way_of, reason=_unwritten(rescaled), rescaled=reason)


def served_of(config: PreTrainedConfig) -> dict[str, Mapping[str, Served]]:
    """Return the servers for a config, and for the student of each mixer that `target: auto` gives, by class."""
    configs = [config, *(_converted(config, mixer) for mixer in CONVERSIONS)]
    rows = {one.model_type: served_by(one) for one in configs if one is not None}
    return {model_type: row for model_type, row in rows.items() if row is not None}


def _converted(config: PreTrainedConfig, mixer: str = "mamba2") -> PreTrainedConfig | None:
    """Return the config of the student that `target: auto` gives, or None."""
    replaced = [int(config.num_hidden_layers) - 1]  # type: ignore[attr-defined]  # a field of every family's config
    try:
        return plan_conversion(config, mixer=mixer, replace=replaced).config
    except XarchError:
        return None


def _unwritten(config: PreTrainedConfig) -> str | None:
    try:
        mamba_ssm_config(config)
    except XarchError as error:
        return in_short(error)
    return None


def _all_kept(config: PreTrainedConfig, mixer: str, target: str) -> str | None:
    try:
        plan_conversion(config, mixer=mixer, target=target, keep_attention="all")
    except XarchError as error:
        return in_short(error)
    return None


def _missing(layout: Layout, tap: str) -> str | None:
    try:
        sites_of(layout, [tap])
    except XarchError as error:
        return in_short(error)
    return None


def _mixings(layout: Layout) -> tuple[dict[str, str], dict[str, str]]:
    reasons = readable_layers(layout)
    unread = {layout.mixer_kinds[layer]: reason for layer, reason in reasons.items() if reason is not None}
    layers = [layer for layer, reason in reasons.items() if reason is None]
    if not layers:
        return {}, unread
    with torch.no_grad():
        found = trace(layout, token_ids(), taps=["mixing"], layers=layers)["mixing"]
    return {layout.mixer_kinds[layer]: mixing.kind for layer, mixing in found.items()}, unread
