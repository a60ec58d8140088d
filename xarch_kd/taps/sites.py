"""Sites (a tap of a layer) and the hooks that read them. Hooks live only inside `recording`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from xarch_kd.errors import TapError, UsageError, suggest
from xarch_kd.taps.layout import Layout, checked_layers, eager_module

BLOCK_TAPS = ("hidden", "mixer_input", "mixer_output", "mlp_output")
WHOLE_TAPS = ("embedding", "head_input")
TAPS = ("embedding", *BLOCK_TAPS, "head_input")
INSIDE_TAPS = ("mixer_input", "mixer_output", "mlp_output")


class Site(NamedTuple):
    """One place to read: a tap, and the block's index (None for `embedding` and `head_input`)."""

    tap: str
    layer: int | None


class StopPass(Exception):
    """Unwinds a forward pass that has nothing more to yield; never leaves `recording`."""

    def __init__(self, owner: object) -> None:
        self.owner = owner


def sites_of(
    layout: Layout, taps: Sequence[str] | Mapping[str, Sequence[int] | None], layers: Sequence[int] | None = None
) -> tuple[Site, ...]:
    """The sites that `taps` (names, or name → layers) at `layers` (None: every block) mean in this model.

    Raises UsageError for an unknown tap or layer, TapError for a tap that the family lacks.
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
                f"Blocks of a model of type '{layout.model.config.model_type}' have no MLP that is known.",
                asked=tap,
                allowed=", ".join(name for name in TAPS if name != tap),
                fix="leave this tap out, or, if its blocks have one, give it: `paths: {mlp: …}`",
            )
        chosen = next((given for given in (own_layers, layers) if given is not None), range(len(layout.blocks)))
        sites += [Site(tap, layer) for layer in checked_layers(layout, chosen)]
    return tuple(sites)


def is_checkpointing(block: nn.Module) -> bool:
    """Whether this block recomputes its activations in the backward pass."""
    inner = eager_module(block)
    return bool(getattr(inner, "gradient_checkpointing", False)) and inner.training and torch.is_grad_enabled()


def refuse_unreadable(layout: Layout, sites: Sequence[Site]) -> None:
    """Raise TapError where hooks would silently miss a tap or its gradient."""
    if any(is_checkpointing(block) and _is_reentrant(block) for block in layout.blocks):
        raise TapError(
            "Reentrant gradient checkpointing runs the blocks without a graph, so losses at taps would silently lose "
            "their gradients.",
            asked="taps under gradient checkpointing with use_reentrant=True",
            allowed="use_reentrant=False",
            fix='enable it with {"use_reentrant": False}, the default of transformers',
        )
    for site in sites:
        block = layout.blocks[site.layer or 0]
        if site.tap in INSIDE_TAPS and _is_compiled(block):
            raise TapError(
                "A tap inside a compiled block cannot be read: compiled code does not call hooks that are added later.",
                asked=_said(site),
                found="a block compiled by torch.compile",
                allowed="embedding, hidden, head_input",
                fix="read `hidden`, or compile the mixer and the MLP of the block instead of the whole block",
            )


@contextmanager
def recording(
    layout: Layout, sites: Sequence[Site], *, stop_after: nn.Module | None = None
) -> Iterator[dict[Site, Tensor]]:
    """Fill a dict with the tensors at `sites` while models run inside the `with`; hooks are gone when it ends.

    The first value of a site wins (a module may be called again). When `stop_after` has returned, the pass ends there.
    A site at the head's input is not filled here: it is what the base model returns.
    """
    values: dict[Site, Tensor] = {}
    owner = object()
    handles: list[RemovableHandle] = []

    def stop(*_: object) -> None:
        raise StopPass(owner)

    try:
        handles += [_attach(layout, site, values) for site in sites if site.tap != "head_input"]
        if stop_after is not None:
            handles.append(stop_after.register_forward_hook(stop))
        elif sites and all(site.tap == "embedding" for site in sites):
            handles.append(layout.blocks[0].register_forward_pre_hook(stop))
        try:
            yield values
        except StopPass as reached:
            if reached.owner is not owner:
                raise
            # The frames of the pass that was ended would keep its tensors alive until a garbage collection.
            reached.__traceback__ = None
    finally:
        for handle in handles:
            handle.remove()
    _finish(layout, sites, values)


def first_tensor(output: object) -> Tensor:
    """The hidden state in what a block or mixer returned: a tensor, or the first entry of a tuple."""
    tensor = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(tensor, Tensor):
        raise TapError(
            "A module returned no hidden state.", found=type(output).__name__, allowed="a tensor, or a tuple"
        )
    return tensor


def hidden_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden state that a block or mixer was called with."""
    return first_tensor(args[0] if args else kwargs.get("hidden_states"))


def _finish(layout: Layout, sites: Sequence[Site], values: dict[Site, Tensor]) -> None:
    missing = [_said(site) for site in sites if site not in values and site.tap != "head_input"]
    if missing:
        raise TapError(
            "A module that a tap reads was never called in this pass.",
            asked=", ".join(missing),
            fix="check `paths:`; some models pass such a module's weights to a function instead of calling it",
        )
    # Scaled out here, not in the hook, so that nothing is added to a graph that checkpointing will recompute.
    if layout.residual_scale != 1.0:
        for site in values:
            if site.tap in ("mixer_output", "mlp_output"):
                values[site] = values[site] * layout.residual_scale


def _attach(layout: Layout, site: Site, values: dict[Site, Tensor]) -> RemovableHandle:
    layer = site.layer or 0
    if site.tap == "embedding":
        return layout.blocks[0].register_forward_pre_hook(_input_hook(site, values), with_kwargs=True)
    if site.tap == "mixer_input":
        return layout.mixers[layer].register_forward_pre_hook(_input_hook(site, values), with_kwargs=True)
    if site.tap == "mixer_output":
        return layout.mixer_outputs[layer].register_forward_hook(_output_hook(site, values))
    if site.tap == "mlp_output" and layout.mlp_outputs is not None:
        return layout.mlp_outputs[layer].register_forward_hook(_output_hook(site, values))
    return layout.blocks[layer].register_forward_hook(_output_hook(site, values))


def _input_hook(site: Site, values: dict[Site, Tensor]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values.setdefault(site, hidden_argument(args, kwargs))

    return read


def _output_hook(site: Site, values: dict[Site, Tensor]) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
    def read(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        values.setdefault(site, first_tensor(output))

    return read


def _is_compiled(block: nn.Module) -> bool:
    return eager_module(block) is not block or getattr(block, "_compiled_call_impl", None) is not None


def _is_reentrant(block: nn.Module) -> bool:
    function = getattr(eager_module(block), "_gradient_checkpointing_func", None)
    # torch's checkpoint is reentrant when the choice is left out.
    if isinstance(function, functools.partial):
        return function.keywords.get("use_reentrant") is not False
    return function is checkpoint


def _said(site: Site) -> str:
    return site.tap if site.layer is None else f"{site.tap} of block {site.layer}"
