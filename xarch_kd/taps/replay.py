"""Replay of single blocks and mixers on given inputs, with their other arguments recorded beforehand.

Used to run a student's blocks on the teacher's inputs without a full student pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from xarch_kd.errors import UsageError
from xarch_kd.mixing.base import Mixing
from xarch_kd.taps.layout import Layout, eager_module, layout_of, run_base
from xarch_kd.taps.recording import Feature, hidden_argument, recording
from xarch_kd.taps.sites import BLOCK_TAPS, MIXING_TAPS, WHOLE_TAPS, Site, is_checkpointing, refuse_unreadable, sites_of


@dataclass(frozen=True)
class BlockCall:
    """Arguments of a block besides the hidden state: masks, positions, rotary tables.

    `attention_mask` [batch, time] is the model's argument, not the mask that the model derives for the block.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    attention_mask: Tensor | None = None


def block_calls(
    model: PreTrainedModel | Layout,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    paths: Mapping[str, str | None] | object | None = None,
    position_ids: Tensor | None = None,
) -> tuple[BlockCall, ...]:
    """Record the arguments of each block for `input_ids` [batch, time], one BlockCall per block.

    This is one pass of the base model without gradients in which the blocks are replaced by identities; they are
    restored in any case. For a family outside the table the first block of each class runs once to determine its return
    value.
    """
    layout = layout_of(model, paths)
    calls: dict[int, BlockCall] = {}
    returns: dict[type[nn.Module], str] = {}

    def stand_in(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        hidden = hidden_argument(args, kwargs)
        extra = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls[index] = BlockCall(args[1:], extra, attention_mask)
        form = layout.family.block_returns or returns.get(type(layout.blocks[index]))
        if form is None:
            form = "tuple" if isinstance(layout.blocks[index](*args, **kwargs), tuple) else "tensor"
            returns[type(layout.blocks[index])] = form
        if form == "tensor":
            return hidden
        return (hidden, None, None) if form == "triple" else (hidden, None)

    with torch.no_grad(), _stand_ins(layout, stand_in):
        run_base(layout, input_ids, attention_mask, position_ids)
    return tuple(calls[index] for index in range(len(layout.blocks)))


def read_block(
    layout: Layout, layer: int, hidden: Tensor, calls: Sequence[BlockCall], taps: Sequence[str] = ("hidden",)
) -> dict[str, Any]:
    """Run block `layer` on `hidden` [batch, time, dim] and return the features at `taps` of that block.

    The run ends after the last of them: the MLP does not run if only taps of the mixer are requested.

    Raises UsageError and TapError as `trace` does.
    """
    outside = [tap for tap in taps if tap in WHOLE_TAPS]
    if outside:
        raise UsageError(
            "A block has no such tap.",
            asked=", ".join(outside),
            allowed=", ".join(BLOCK_TAPS),
        )
    sites = sites_of(layout, taps, [layer])
    refuse_unreadable(layout, sites)
    block = layout.blocks[layer]
    call = calls[layer]
    with recording(layout, sites, attention_mask=call.attention_mask, stops=not is_checkpointing(block)) as values:
        block(hidden, *call.args, **call.kwargs)
    return {site.tap: values[site] for site in sites}


def run_block(layout: Layout, layer: int, hidden: Tensor, calls: Sequence[BlockCall]) -> Tensor:
    """Run block `layer` on `hidden` [batch, time, dim] and return the residual stream after it."""
    return read_block(layout, layer, hidden, calls)["hidden"]


def run_mixer(layout: Layout, layer: int, mixer_input: Tensor, calls: Sequence[BlockCall]) -> Tensor:
    """Run the mixer of block `layer` on `mixer_input` [batch, time, dim] and return its `mixer_output`.

    The block calls its mixer, so that the mixer gets its usual arguments; its input is replaced, and the run ends after
    its output. A block under gradient checkpointing recomputes its mixer in the backward pass.
    """
    return read_mixer(layout, layer, mixer_input, calls, ["mixer_output"])["mixer_output"]


def read_mixing(layout: Layout, layer: int, mixer_input: Tensor, calls: Sequence[BlockCall]) -> Mixing:
    """Return the mixing matrix of the mixer of block `layer` for `mixer_input` [batch, time, dim].

    The run ends once the factors are recorded: neither attention nor a scan runs. Raises TapError for a mixer whose
    matrix is not supported.
    """
    return read_mixer(layout, layer, mixer_input, calls, ["mixing"])["mixing"]


def read_mixer(
    layout: Layout, layer: int, mixer_input: Tensor, calls: Sequence[BlockCall], taps: Sequence[str]
) -> dict[str, Any]:
    """Run the mixer of block `layer` on `mixer_input` and return `taps` of `mixer_output`, `mixing`, `values`.

    The mixer runs once for all of them; see `run_mixer` and `read_mixing`.

    Raises UsageError for another tap, TapError as `trace` does.
    """
    outside = [tap for tap in taps if tap not in ("mixer_output", *MIXING_TAPS)]
    if outside or not taps:
        raise UsageError(
            "A mixer alone has no such tap.",
            asked=", ".join(outside) or "none",
            allowed=", ".join(("mixer_output", *MIXING_TAPS)),
        )
    sites = sites_of(layout, taps, [layer])
    refuse_unreadable(layout, sites)
    if not is_checkpointing(layout.blocks[layer]):
        return _run_mixer(layout, sites, mixer_input, calls[layer])
    found: Any = checkpoint(_run_mixer, layout, sites, mixer_input, calls[layer], use_reentrant=False)
    return found


def _run_mixer(layout: Layout, sites: Sequence[Site], mixer_input: Tensor, call: BlockCall) -> dict[str, Feature]:
    def feed(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (mixer_input, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": mixer_input}

    layer = sites[0].layer or 0
    handle = layout.mixers[layer].register_forward_pre_hook(feed, with_kwargs=True)
    try:
        with (
            _without_checkpointing(layout.blocks[layer]),
            recording(layout, sites, attention_mask=call.attention_mask) as values,
        ):
            layout.blocks[layer](mixer_input.detach(), *call.args, **call.kwargs)
    finally:
        handle.remove()
    return {site.tap: values[site] for site in sites}


@contextmanager
def _without_checkpointing(block: nn.Module) -> Iterator[None]:
    # A block may contain another that has checkpointing of its own.
    saving = [module for module in eager_module(block).modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in saving:
            module.gradient_checkpointing = False  # type: ignore[assignment]  # a plain flag of transformers' layers
        yield
    finally:
        for module in saving:
            module.gradient_checkpointing = True  # type: ignore[assignment]


class _StandIn(nn.Module):
    """Stand-in for a block in the list of blocks; forwards the block's attributes, which some models read."""

    def __init__(self, block: nn.Module, answer: Callable[[tuple[Any, ...], dict[str, Any]], object]) -> None:
        super().__init__()
        self.answer = answer
        # In a tuple, so that the block is not registered as a child.
        self.block = (block,)

    def forward(self, *args: Any, **kwargs: Any) -> object:
        return self.answer(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("block", "answer"):
            raise AttributeError(name)
        return getattr(self.block[0], name)


@contextmanager
def _stand_ins(layout: Layout, answer: Callable[[int, tuple[Any, ...], dict[str, Any]], object]) -> Iterator[None]:
    try:
        for index, block in enumerate(layout.blocks):
            layout.container[index] = _StandIn(block, lambda args, kwargs, index=index: answer(index, args, kwargs))
        yield
    finally:
        for index, block in enumerate(layout.blocks):
            layout.container[index] = block
