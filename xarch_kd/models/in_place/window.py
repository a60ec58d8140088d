"""Attention through a sliding window with sinks: its mask, its cache, and its use in a teacher's own blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from xarch_kd.errors import ConversionError

# Implementations whose masks are tensors; the others would leave the window out or read another kind of mask.
IMPLEMENTATIONS = ("eager", "sdpa")
ARGUMENT = "window_mask"


def window_visible(queries: Tensor, keys: Tensor, *, window: int, sinks: int, starts: Tensor | None = None) -> Tensor:
    """Return which keys each query attends to, bool [batch, queries, keys].

    Key j is visible to query i if j ≤ i and it is one of the last `window` tokens (i − j < window) or one of the first
    `sinks` of its document. `queries` [queries] and `keys` [keys] are positions in the row; `starts` [batch, positions]
    is the position at which each position's document begins, by default 0 everywhere.

    >>> window_visible(torch.arange(4), torch.arange(4), window=2, sinks=1)[0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """
    distance = (queries[:, None] - keys)[None]
    if starts is None:
        return (distance >= 0) & ((distance < window) | (keys < sinks))
    of_query, of_key = starts[:, queries, None], starts[:, None, keys]
    is_sink = keys - of_key < sinks
    return (distance >= 0) & (of_query == of_key) & ((distance < window) | is_sink)


class WindowLayer(DynamicLayer):
    """Cache of one block: keys and values of the first `head` positions of a row and of the last `window` − 1.

    `positions` [kept] are those of the kept keys in the row.
    """

    is_sliding = True

    def __init__(self, window: int, head: int) -> None:
        super().__init__()
        self.window, self.head, self.total = window, head, 0
        self._positions = torch.arange(0)

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Return the positions [kept + new] of the keys that the next call of `update` with `new` tokens returns."""
        return torch.cat((self._positions.to(device), torch.arange(self.total, self.total + new, device=device)))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return kept and new keys and values, [batch, heads, kept + new, dim], and keep what later tokens see."""
        positions = self.positions(key_states.shape[-2], key_states.device)
        keys, values = super().update(key_states, value_states)
        self.total += key_states.shape[-2]
        kept = ((positions < self.head) | (self.total - positions < self.window)).nonzero().flatten()
        self.keys, self.values, self._positions = keys[:, :, kept], values[:, :, kept], positions[kept]
        return keys, values

    def get_seq_length(self) -> int:
        """Return the number of tokens that were passed to `update`."""
        return self.total

    def get_max_length(self) -> int:
        """Return the largest number of kept tokens."""
        return self.head + self.window - 1

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ConversionError: tokens that left the window cannot be brought back."""
        if tokens_to_remove:
            raise ConversionError("The cache of a window cannot be rolled back.", asked=f"crop({tokens_to_remove})")

    def reset(self) -> None:
        """Drop all tokens."""
        super().reset()
        self.total, self._positions = 0, torch.arange(0)


def through_window(attention: nn.Module) -> nn.Module:
    """Return a teacher's attention that uses the mask that `window_inputs` gives, in place of the model's own."""
    # A hook, since taps look for the attention function beside the class's own forward.
    attention.register_forward_pre_hook(_with_window, with_kwargs=True)
    return attention


def _with_window(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = kwargs.get(ARGUMENT)
    return args, kwargs if mask is None else {**kwargs, "attention_mask": mask}


def window_inputs(
    config: Any,
    embeddings: Tensor,
    *,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Any,
    use_cache: bool,
) -> tuple[Any, Tensor | None]:
    """Return the cache, and the mask of the replaced blocks [batch, 1, queries, keys], or None while all is visible.

    `embeddings` [batch, time, any] give sizes, device and type. Raises ConversionError for an attention implementation,
    a mask or a cache that a window does not fit.
    """
    window, sinks = config.mixer_settings["window"], config.mixer_settings["sinks"]
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise ConversionError(
            "The window is in the mask, which this attention implementation does not read.",
            asked=f"attn_implementation: {config._attn_implementation}",
            allowed=" | ".join(IMPLEMENTATIONS),
        )
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        raise ConversionError("A model with a window takes a mask [batch, time].", found="a mask of another form")
    batch, time = embeddings.shape[:2]
    device = embeddings.device
    padding = None if attention_mask is None else attention_mask.to(device).bool()
    pads = None if padding is None else padding.int().argmax(1)
    head = sinks + (0 if pads is None else int(pads.max()))
    if cache is None and use_cache:
        cache = DynamicCache(config=config)
    layer = None if cache is None else _window_layer(cache, config, window, head)
    before = 0 if layer is None else layer.total
    starts = _starts(batch, before + time, pads, position_ids if before == 0 else None, device)
    if before + time <= window + sinks and not bool((starts != starts[:, :1]).any()):
        return cache, None
    queries = torch.arange(before, before + time, device=device)
    keys = queries if layer is None else layer.positions(time, device)
    visible = window_visible(queries, keys, window=window, sinks=sinks, starts=starts)
    if padding is not None:
        visible = visible & padding[:, None, keys]
    if config._attn_implementation == "eager":
        lowest = torch.zeros(visible.shape, dtype=embeddings.dtype, device=device)
        return cache, lowest.masked_fill(~visible, torch.finfo(embeddings.dtype).min)[:, None]
    return cache, visible[:, None]


def _starts(batch: int, total: int, pads: Tensor | None, position_ids: Tensor | None, device: torch.device) -> Tensor:
    """Return the position [batch, total] at which each position's document begins: after padding, or where ids are 0.

    Padding belongs to the document that follows it.
    """
    starts = torch.zeros(batch, total, dtype=torch.long, device=device)
    if position_ids is not None and pads is None:
        positions = torch.arange(total, device=device)
        begins = torch.where(position_ids.to(device) == 0, positions, 0)
        starts = begins.cummax(1).values.expand(batch, -1)
    return starts if pads is None else pads[:, None].expand(-1, total)


def _window_layer(cache: Any, config: Any, window: int, head: int) -> WindowLayer:
    """Return the cache of the first replaced block, after putting a `WindowLayer` at each of them."""
    if not isinstance(cache, DynamicCache):
        raise ConversionError(
            "A model with a window generates with transformers' dynamic cache.",
            asked=type(cache).__name__,
            allowed="DynamicCache, the default of generate",
        )
    replaced: Iterable[int] = config.replaced_layers
    cache.layers.extend(DynamicLayer() for _ in range(len(cache.layers), config.num_hidden_layers))
    for index in replaced:
        if not isinstance(cache.layers[index], WindowLayer):
            if getattr(cache.layers[index], "is_initialized", True):
                raise ConversionError("The cache holds tokens of another model.", found=type(cache).__name__)
            cache.layers[index] = WindowLayer(window, head)
    first = cache.layers[config.replaced_layers[0]]
    assert isinstance(first, WindowLayer)
    return first
