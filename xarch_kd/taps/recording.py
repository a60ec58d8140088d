"""Hooks that record the sites of a forward pass. They exist only inside `recording`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xarch_kd.errors import TapError
from xarch_kd.mixing.base import Mixing
from xarch_kd.taps.layout import Layout
from xarch_kd.taps.mixings import MixingTap, Running, mixing_tap
from xarch_kd.taps.sites import INSIDE_TAPS, MIXING_TAPS, Site, is_checkpointing, site_text

Feature = Tensor | Mixing


class StopPass(Exception):
    """Exception that ends a forward pass once all sites are recorded; never leaves `recording`."""

    def __init__(self, owner: object) -> None:
        self.owner = owner


@contextmanager
def recording(
    layout: Layout, sites: Sequence[Site], *, attention_mask: Tensor | None = None, stops: bool = True
) -> Iterator[dict[Site, Any]]:
    """Record the features at `sites` in a dict while models run inside the `with`; the hooks are removed at its end.

    `attention_mask` [batch, time] is that of the pass; only `mixing` and `values` need it. The first value of a site is
    used if a module is called again. With `stops` the pass ends as soon as all sites are recorded, or at the end of the
    block if that block will be recomputed. `head_input` is not recorded here: the base model returns it.
    """
    values: dict[Site, Feature] = {}
    recorder = _Recorder(layout, [site for site in sites if site.tap != "head_input"], values, stops)
    with ExitStack() as stack:
        recorder.attach(stack)
        try:
            yield values
        except StopPass as reached:
            if reached.owner is not recorder:
                raise
            # The frames of the aborted pass would keep its tensors alive until a garbage collection.
            reached.__traceback__ = None
    recorder.finish(attention_mask)


def first_tensor(output: object) -> Tensor:
    """Return the hidden state from the output of a block or mixer: a tensor, or the first element of a tuple."""
    tensor = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(tensor, Tensor):
        raise TapError(
            "A module returned no hidden state.", found=type(output).__name__, allowed="a tensor, or a tuple"
        )
    return tensor


def hidden_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden state from the arguments of a block or mixer."""
    return first_tensor(args[0] if args else kwargs.get("hidden_states"))


class _Recorder:
    """State of one recording: the missing sites and the hooks that record them."""

    def __init__(self, layout: Layout, sites: Sequence[Site], values: dict[Site, Feature], stops: bool) -> None:
        self.layout = layout
        self.sites = sites
        self.values = values
        # Both taps of a block are recorded together.
        asked: dict[int, list[Site]] = {}
        for site in sites:
            if site.tap in MIXING_TAPS:
                asked.setdefault(site.layer or 0, []).append(site)
        self.mixings: list[tuple[MixingTap, list[Site]]] = [
            (mixing_tap(layout, layer, [site.tap for site in own]), own) for layer, own in asked.items()
        ]
        self.waiting = set(sites)
        self.last = layout.blocks[max((site.layer or 0 for site in sites), default=0)]
        self.stops = stops and bool(sites)
        # An exception must not leave a block that will be recomputed.
        self.stops_inside = self.stops and not is_checkpointing(self.last)

    def attach(self, stack: ExitStack) -> None:
        """Register the hooks on the model until `stack` closes."""
        for tap, sites in self.mixings:
            tap.attach(stack, lambda sites=sites: self._arrived(*sites))
        for site in self.sites:
            if site.tap not in MIXING_TAPS:
                self._attach(stack, site)
        if self.stops and not all(site.tap == "embedding" for site in self.sites):
            stack.callback(self.last.register_forward_hook(self._stop).remove)

    def _attach(self, stack: ExitStack, site: Site) -> None:
        layout, layer = self.layout, site.layer or 0
        running = Running(layout.blocks[layer], stack) if site.tap in INSIDE_TAPS else None
        if site.tap in ("embedding", "mixer_input"):
            module = layout.blocks[0] if site.tap == "embedding" else layout.mixers[layer]
            hook = self._input_hook(site, running)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            return
        module = layout.blocks[layer]
        if site.tap == "mixer_output":
            module = layout.mixer_outputs[layer]
        elif site.tap == "mlp_output" and layout.mlp_outputs is not None:
            module = layout.mlp_outputs[layer]
        stack.callback(module.register_forward_hook(self._output_hook(site, running)).remove)

    def _input_hook(
        self, site: Site, running: Running | None
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if running is None or running.now:
                self.values.setdefault(site, hidden_argument(args, kwargs))
                self._arrived(site)

        return record

    def _output_hook(self, site: Site, running: Running | None) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if running is None or running.now:
                self.values.setdefault(site, self._residual(output) if site.tap == "hidden" else first_tensor(output))
                self._arrived(site)

        return record

    def _residual(self, output: object) -> Tensor:
        if self.layout.family.block_returns == "pair" and isinstance(output, tuple) and output[1] is not None:
            return output[0] + output[1]
        return first_tensor(output)

    def _arrived(self, *sites: Site) -> None:
        self.waiting.difference_update(sites)
        if not self.waiting and (self.stops_inside or (self.stops and sites[0].tap == "embedding")):
            self._stop()

    def _stop(self, *_: object) -> None:
        raise StopPass(self)

    def finish(self, attention_mask: Tensor | None) -> None:
        """Return the requested features. Raises TapError for a site that the pass did not reach."""
        # Built here, not in the hooks, so that nothing is added to a graph that checkpointing will recompute.
        for tap, sites in self.mixings:
            for site in sites:
                value = tap.mixing(attention_mask) if site.tap == "mixing" else tap.values(attention_mask)
                # A factor may be a parameter, which has its own gradient.
                self.values[site] = value if torch.is_grad_enabled() else value.detach()
        missing = [site_text(site) for site in self.sites if site not in self.values]
        if missing:
            raise TapError(
                "The module of a tap was never called in this pass.",
                asked=", ".join(missing),
                fix="check `paths:`; some models pass such a module's weights to a function instead of calling it",
            )
        for site, value in self.values.items():
            scale = _scale(self.layout, site)
            if scale != 1.0 and isinstance(value, Tensor):
                self.values[site] = value * scale


def _scale(layout: Layout, site: Site) -> float:
    if site.tap == "mixer_output":
        return layout.mixer_scales[site.layer or 0]
    return layout.mlp_scale if site.tap == "mlp_output" else 1.0
