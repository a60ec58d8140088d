"""Sites (a tap at a layer), and checks of their support in a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xarch_kd.errors import TapError, UsageError, suggest
from xarch_kd.taps.layout import Layout, checked_layers, eager_module
from xarch_kd.taps.mixings import mixing_tap

Tap = Literal["embedding", "hidden", "mixer_input", "mixer_output", "mlp_output", "mixing", "values", "head_input"]
# Editors complete the literals; names that are computed are strings.
TapSelection = Sequence[Tap] | Sequence[str] | Mapping[Tap, Sequence[int] | None] | Mapping[str, Sequence[int] | None]
MIXING_TAPS = ("mixing", "values")
BLOCK_TAPS = ("hidden", "mixer_input", "mixer_output", "mlp_output", *MIXING_TAPS)
WHOLE_TAPS = ("embedding", "head_input")
TAPS: tuple[Tap, ...] = get_args(Tap)
# Outputs of a mixer without the block around it.
MIXER_TAPS = frozenset({"mixer_output", *MIXING_TAPS})
INSIDE_TAPS = ("mixer_input", "mixer_output", "mlp_output", *MIXING_TAPS)


class Site(NamedTuple):
    """Site: a tap, and the block's index (None for `embedding` and `head_input`)."""

    tap: str
    layer: int | None


def sites_of(layout: Layout, taps: TapSelection, layers: Sequence[int] | None = None) -> tuple[Site, ...]:
    """Return the sites of `taps` (names, or name → layers) at `layers` (None: every block) in this model.

    Raises UsageError for an unknown tap or layer, TapError for a tap that the family does not have.
    """
    if isinstance(taps, str):
        raise UsageError("taps must be a sequence of names.", asked=repr(taps), fix=f'taps=["{taps}"]')
    asked = dict(taps) if isinstance(taps, Mapping) else dict.fromkeys(taps, layers)
    sites: list[Site] = []
    for tap, own_layers in asked.items():
        if tap not in TAPS:
            raise UsageError(f"Unknown tap.{suggest(tap, TAPS)}", asked=tap, allowed=", ".join(TAPS))
        if tap in WHOLE_TAPS:
            sites.append(Site(tap, None))
            continue
        if tap == "mlp_output" and layout.mlp_outputs is None:
            raise TapError(
                f"A model of type {layout.model_type} has no tap mlp_output: its family's table names no MLP.",
                asked=tap,
                allowed=", ".join(name for name in TAPS if name != tap),
                fix="leave this tap out, or, if its blocks have one, give it: `paths: {mlp: …}`",
            )
        chosen = next((given for given in (own_layers, layers) if given is not None), range(len(layout.blocks)))
        chosen = checked_layers(layout, chosen)
        if tap in MIXING_TAPS:
            # Built only because it raises if the mixer is not supported.
            for layer in chosen:
                mixing_tap(layout, layer, [tap])
        sites += [Site(tap, layer) for layer in chosen]
    return tuple(sites)


def is_checkpointing(block: nn.Module) -> bool:
    """Return True if this block recomputes its activations in the backward pass."""
    inner = eager_module(block)
    return bool(getattr(inner, "gradient_checkpointing", False)) and inner.training and torch.is_grad_enabled()


def refuse_unreadable(layout: Layout, sites: Sequence[Site]) -> None:
    """Raise TapError if hooks would silently miss a tap or its gradient."""
    if any(is_checkpointing(block) and _is_reentrant(block) for block in layout.blocks):
        raise TapError(
            "Reentrant gradient checkpointing runs the blocks without a graph, so losses at taps would silently lose "
            "their gradients.",
            asked="taps under gradient checkpointing with use_reentrant=True",
            allowed="use_reentrant=False",
            fix='enable it with {"use_reentrant": False}, the default of transformers',
        )
    every = getattr(layout.model.config, "rescale_every", 0)
    if 0 < every <= len(layout.blocks) and not layout.model.training:
        raise TapError(
            f"A model of type {layout.model_type} halves its hidden state on the way when it does not train, so that "
            "what is read would differ from what it learns with by powers of two.",
            asked=", ".join(sorted({site.tap for site in sites})),
            found=f"rescale_every: {every} in the config of a model of {len(layout.blocks)} blocks",
            fix="set rescale_every: 0 in its config.json, which changes its logits by rounding alone",
        )
    for site in sites:
        block = layout.blocks[site.layer or 0]
        if site.tap in INSIDE_TAPS and _is_compiled(block):
            raise TapError(
                "A tap inside a compiled block cannot be read: compiled code does not call hooks that are added later.",
                asked=site_text(site),
                found="a block compiled by torch.compile",
                allowed="embedding, hidden, head_input",
                fix="read `hidden`, or compile the mixer and the MLP of the block instead of the whole block",
            )
        if site.tap in MIXING_TAPS and _is_compiled(layout.mixers[site.layer or 0]):
            raise TapError(
                f"The {site.tap} of a compiled mixer cannot be read: it is read inside the mixer.",
                asked=site_text(site),
                found="a mixer compiled by torch.compile",
                fix="read `mixer_output`, or leave the mixer uncompiled",
            )


def site_text(site: Site) -> str:
    """Return the site in words."""
    return site.tap if site.layer is None else f"{site.tap} of block {site.layer}"


def _is_compiled(block: nn.Module) -> bool:
    return eager_module(block) is not block or getattr(block, "_compiled_call_impl", None) is not None


def _is_reentrant(block: nn.Module) -> bool:
    function = getattr(eager_module(block), "_gradient_checkpointing_func", None)
    # torch's checkpoint is reentrant by default.
    if isinstance(function, functools.partial):
        return function.keywords.get("use_reentrant") is not False
    return function is checkpoint
