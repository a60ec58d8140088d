"""Taps of the mixing matrix of one block and its values: records during a pass, and the matrix built from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any, Protocol

from torch import Tensor, nn

from xarch_kd.errors import TapError
from xarch_kd.mixing.base import Mixing
from xarch_kd.taps.adapters import ADAPTERS, MAMBA_SSM_ADAPTERS, MixerAdapter
from xarch_kd.taps.adapters.base import OWN_INPUT
from xarch_kd.taps.layout import Layout, eager_module
from xarch_kd.taps.mamba_ssm import is_of_mamba_ssm
from xarch_kd.taps.softmax import AttentionCall, calls_attention_interface, intercepting, never_called


class MixingTap(Protocol):
    """Tap of one mixer. `attach` hooks the mixer until `stack` closes; `arrived` is called once all is recorded."""

    def attach(self, stack: ExitStack, arrived: Callable[[], None]) -> None: ...

    def mixing(self, attention_mask: Tensor | None) -> Mixing:
        """Return the Mixing built from the records; the mask [batch, time] is that of the pass."""
        ...

    def values(self, attention_mask: Tensor | None) -> Tensor:
        """Return the values that the matrix is applied to, [batch, time, heads, dim], with the mask as for `mixing`."""
        ...


def mixing_tap(layout: Layout, layer: int, taps: Collection[str] = ("mixing",)) -> MixingTap:
    """Return a new tap of the mixer of block `layer` for `taps`, out of `mixing` and `values`.

    Raises TapError for an unknown class of mixer.
    """
    asked = " and ".join(taps)
    block, mixer = layout.blocks[layer], layout.mixers[layer]
    adapter = adapter_of(mixer)
    if adapter is not None:
        return RecurrentTap(block, mixer, adapter)
    if layout.mixer_kinds[layer] != "attention":
        raise TapError(
            f"The mixing matrix of {type(eager_module(mixer)).__name__} cannot be built: its class has no adapter.",
            asked=f"{asked} of block {layer}",
            allowed=f"softmax attention, {', '.join(sorted(ADAPTERS))}",
            fix="leave its layer out, or use mixer_output instead",
        )
    if not calls_attention_interface(mixer):
        raise never_called(mixer, asked)
    return SoftmaxTap(block, mixer, taps)


def adapter_of(mixer: nn.Module) -> MixerAdapter | None:
    """Return the adapter of a mixer, by the name of its class or a base class; None for attention of transformers."""
    inner = eager_module(mixer)
    foreign = (adapter for name, adapter in MAMBA_SSM_ADAPTERS.items() if is_of_mamba_ssm(inner, name))
    names = (parent.__name__ for parent in type(inner).__mro__)
    return next(foreign, None) or next((ADAPTERS[name] for name in names if name in ADAPTERS), None)


class Running:
    """Flag that is true while a block runs, until `stack` closes: several blocks may call one module."""

    def __init__(self, block: nn.Module, stack: ExitStack) -> None:
        self.now = False
        handles = (block.register_forward_pre_hook(self._begin), block.register_forward_hook(self._end))
        for handle in handles:
            stack.callback(handle.remove)

    def _begin(self, *_: object) -> None:
        self.now = True

    def _end(self, *_: object) -> None:
        self.now = False


class SoftmaxTap:
    """Tap that records the first attention call of a mixer while its block runs."""

    def __init__(self, block: nn.Module, mixer: nn.Module, taps: Collection[str]) -> None:
        self.block = block
        self.mixer = mixer
        self.taps = taps
        self.call: AttentionCall | None = None
        self.value: Tensor | None = None

    def attach(self, stack: ExitStack, arrived: Callable[[], None]) -> None:
        """See `MixingTap`."""
        running = Running(self.block, stack)

        def keep(call: AttentionCall) -> None:
            if not running.now or self.call is not None or self.value is not None:
                return
            if "mixing" in self.taps:
                self.call = dataclasses.replace(call, value=None)
            if "values" in self.taps:
                self.value = call.checked_value()
            arrived()

        stack.enter_context(intercepting(self.mixer, keep))

    def mixing(self, attention_mask: Tensor | None) -> Mixing:
        """See `MixingTap`. Raises TapError if the attention function was never called."""
        if self.call is None:
            raise never_called(self.mixer)
        return self.call.mixing(attention_mask)

    def values(self, attention_mask: Tensor | None) -> Tensor:
        """See `MixingTap`. Raises TapError if the attention function was never called."""
        if self.value is None:
            raise never_called(self.mixer, "values")
        return self.value.transpose(1, 2)


class RecurrentTap:
    """Tap that records the outputs of a recurrent mixer's projections while its block runs."""

    def __init__(self, block: nn.Module, mixer: nn.Module, adapter: MixerAdapter) -> None:
        self.block = block
        self.mixer = mixer
        self.adapter = adapter
        self.projected: dict[str, Tensor] = {}

    def attach(self, stack: ExitStack, arrived: Callable[[], None]) -> None:
        """See `MixingTap`."""
        running = Running(self.block, stack)
        for path in self.adapter.projections:
            keep = self._keeper(path, running, arrived)
            if path == OWN_INPUT:
                handle = self.mixer.register_forward_pre_hook(_on_input(keep))
            else:
                module = self.mixer.get_submodule(path)
                handle = module.register_forward_hook(lambda _, args, output, keep=keep: keep(output))
            stack.callback(handle.remove)

    def _keeper(self, path: str, running: Running, arrived: Callable[[], None]) -> Callable[[Tensor], None]:
        def keep(tensor: Tensor) -> None:
            if running.now and path not in self.projected:
                self.projected[path] = tensor
                if len(self.projected) == len(self.adapter.projections):
                    arrived()

        return keep

    def mixing(self, attention_mask: Tensor | None) -> Mixing:
        """See `MixingTap`. Raises TapError if a projection was never called."""
        return self.adapter.build(eager_module(self.mixer), self._all_projected("mixing"), attention_mask)

    def values(self, attention_mask: Tensor | None) -> Tensor:
        """See `MixingTap`. Raises TapError if a projection was never called."""
        return self.adapter.values(eager_module(self.mixer), self._all_projected("values"), attention_mask)

    def _all_projected(self, tap: str) -> dict[str, Tensor]:
        missing = [path for path in self.adapter.projections if path not in self.projected]
        if missing:
            raise TapError(
                f"A projection of {type(self.mixer).__name__} was never called in this pass.",
                asked=tap,
                found=f"no output of {', '.join(missing)}",
            )
        return self.projected


def _on_input(keep: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        keep(args[0])

    return hook
