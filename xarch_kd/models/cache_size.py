"""Bytes of cache and state of one sequence: computed from a model's config, and counted in a cache of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xarch_kd.errors import ModelError
from xarch_kd.models.in_place.teachers import WINDOW
from xarch_kd.taps.layout import Layout

# Recurrent states are float32 in all classes of transformers, whatever the dtype of the model.
STATE_BYTES: Final = 4


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Numbers that one layer keeps of one sequence between tokens.

    `per_token` are those of keys and values per token of context, of which at most `window - 1` tokens are kept, and
    `convolution` the last inputs of a short convolution, both in the dtype of the model; `state` are those of a
    recurrent state, in float32.
    """

    per_token: int = 0
    window: int | None = None
    convolution: int = 0
    state: int = 0

    def size(self, tokens: int, dtype: torch.dtype) -> int:
        """Return the bytes after `tokens` tokens of context in a model of `dtype`."""
        kept = tokens if self.window is None else min(tokens, self.window - 1)
        return (self.per_token * kept + self.convolution) * dtype.itemsize + self.state * STATE_BYTES


def cache_layers(layout: Layout) -> tuple[LayerCache, ...]:
    """Return the cache of each block of a model, which may be without storage.

    Raises ModelError for a mixer whose cache is not known here.

    >>> from xarch_kd.models.loading.load import meta_model
    >>> from xarch_kd.taps.layout import layout_of
    >>> from xarch_kd.testing.tiny import tiny_config
    >>> layers = cache_layers(layout_of(meta_model(tiny_config("bamba"))))
    >>> cache_size(layers, 10, torch.bfloat16), cache_size(layers, 11, torch.bfloat16)
    (12544, 12672)
    """
    config: Any = layout.model.config.get_text_config()
    types = getattr(config, "layer_types", None) or [None] * len(layout.blocks)
    layers = [
        _layer(layout, config, kind, mixer, named)
        for kind, mixer, named in zip(layout.mixer_kinds, layout.mixers, types, strict=True)
    ]
    if getattr(config, "mixer", None) == WINDOW:
        # The first tokens are kept beside those of the window.
        kept = config.mixer_settings["window"] + config.mixer_settings["sinks"]
        for index in config.replaced_layers:
            layers[index] = dataclasses.replace(layers[index], window=kept)
    return tuple(layers)


def cache_size(layers: Sequence[LayerCache], tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of cache and state of one sequence after `tokens` tokens, in a model of `dtype`."""
    return sum(layer.size(tokens, dtype) for layer in layers)


def longest_context(layout: Layout) -> int | None:
    """Return the number of positions that a model was made for, None without a limit."""
    stated = getattr(layout.model.config.get_text_config(), "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def smaller_from(
    student: Sequence[LayerCache], teacher: Sequence[LayerCache], longest: int, dtype: torch.dtype
) -> int | None:
    """Return the context from which on, up to `longest` tokens, the student's cache is smaller; None if it is not."""
    larger = np.flatnonzero(_sizes(student, longest, dtype) >= _sizes(teacher, longest, dtype))
    first = int(larger[-1]) + 2 if len(larger) else 1
    return first if first <= longest else None


def _sizes(layers: Sequence[LayerCache], longest: int, dtype: torch.dtype) -> NDArray[np.int64]:
    """Return the bytes of cache and state after 1, 2, … `longest` tokens."""
    tokens = np.arange(1, longest + 1, dtype=np.int64)
    growing = np.zeros(longest, dtype=np.int64)
    for layer in layers:
        kept = tokens if layer.window is None else np.minimum(tokens, layer.window - 1)
        growing += layer.per_token * dtype.itemsize * kept
    return growing + cache_size(layers, 0, dtype)


def tensors_of(cache: Any) -> Iterator[Tensor]:
    """Yield the tensors that the layers of a `transformers.Cache` keep between tokens."""
    for layer in cache.layers:
        for name, value in vars(layer).items():
            # Counters that a layer keeps for itself have private names.
            values = value.values() if isinstance(value, dict) else (value,)
            yield from (each for each in values if isinstance(each, Tensor) and not name.startswith("_"))


def measured_size(cache: Any) -> int:
    """Return the bytes of the entries of a cache; a view counts as large as it looks, not as its storage."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(cache))


def _layer(layout: Layout, config: Any, kind: str, mixer: nn.Module, named: str | None) -> LayerCache:
    """Return the cache of one block; `named` is its entry in the config's `layer_types`, None without any."""
    if kind == "attention":
        return _attention(config, mixer, named)
    if kind == "other" and named in ("mlp", "moe"):
        return LayerCache()
    if kind not in RECURRENT:
        raise _unknown(layout.model_type, kind)
    convolution, state = RECURRENT[kind](mixer)
    # Such a block has attention beside its recurrent mixer.
    beside = _attention(config, mixer, named).per_token if named == "hybrid" else 0
    return LayerCache(per_token=beside, convolution=convolution, state=state)


def _attention(config: Any, mixer: nn.Module, named: str | None) -> LayerCache:
    if getattr(config, "kv_lora_rank", None) is not None:
        raise _unknown(config.model_type, "latent attention")
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    is_windowed = named is None or "sliding" in named
    return LayerCache(per_token=2 * keys * head_dim, window=window if is_windowed else None)


def _unknown(model_type: str, kind: str) -> ModelError:
    return ModelError(
        "The size of a mixer's cache is not known.",
        asked=model_type,
        found=kind,
        allowed=", ".join(("attention", *RECURRENT)),
    )


# Kind of a mixer → numbers of its convolution's state and of its recurrent state.
RECURRENT: Final[dict[str, Callable[[Any], tuple[int, int]]]] = {
    "mamba2": lambda mixer: (
        mixer.conv_dim * mixer.conv_kernel_size,
        mixer.num_heads * mixer.head_dim * mixer.ssm_state_size,
    ),
    "mamba": lambda mixer: (
        mixer.intermediate_size * mixer.conv_kernel_size,
        mixer.intermediate_size * mixer.ssm_state_size,
    ),
    "gated_delta": lambda mixer: (
        mixer.conv_dim * mixer.conv_kernel_size,
        mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim,
    ),
    "kda": lambda mixer: (mixer.conv_dim * mixer.conv_kernel_size, mixer.num_heads * mixer.head_dim**2),
    "short_convolution": lambda mixer: (mixer.conv.in_channels * mixer.conv_kernel_size, 0),
}
