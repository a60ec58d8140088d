"""Bytes of cache and state from a config against those of the cache that transformers returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xarch_kd.errors import ModelError
from xarch_kd.models.cache_size import LayerCache, cache_layers, cache_size, measured_size, smaller_from
from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.loading.load import meta_model
from xarch_kd.taps.layout import layout_of
from xarch_kd.testing.families import SPECIMENS
from xarch_kd.testing.tiny import tiny_model

# Every class that a conversion or a fresh student ends in, and teachers with windows.
CLASSES = (
    "llama",
    "gpt2",
    "gemma2",
    "mistral, sliding_window: 8",
    "qwen3, use_sliding_window: true, sliding_window: 8",
    "bamba",
    "granitemoehybrid",
    "mamba2",
    "mamba",
    "qwen3_5_text",
    "olmo_hybrid",
    "falcon_h1",
    "kimi_linear",
    "lfm2",
    "nemotron_h",
    "xarch_kd_qwen3",
)
# The cache of this class's attention is compressed.
UNKNOWN = {"kimi_linear": "latent attention"}


def cache_of(output: Any) -> Any:
    return output["past_key_values"] if "past_key_values" in output else output["cache_params"]


@pytest.mark.parametrize("name", CLASSES)
def test_computed_bytes_are_those_of_the_cache(name: str) -> None:
    model = SPECIMENS[name].model()
    layout = layout_of(meta_model(model.config))
    if name in UNKNOWN:
        with pytest.raises(ModelError, match=UNKNOWN[name]):
            cache_layers(layout)
        return
    layers = cache_layers(layout)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)  # type: ignore[arg-type]  # stubs expect a bound method
        for tokens in (3, 13):
            with torch.inference_mode():
                cache = cache_of(model(torch.ones(1, tokens, dtype=torch.long), use_cache=True))
            assert measured_size(cache) == cache_size(layers, tokens, dtype), (dtype, tokens)


@pytest.mark.parametrize("target", ["granitemoehybrid", "bamba"])
def test_a_converted_student_keeps_less_per_token(target: str) -> None:
    teacher = tiny_model("llama")
    student = convert(teacher, mixer="mamba2", replace=[0, 2], target=target, check=False)
    own, other = (cache_layers(layout_of(model)) for model in (student, teacher))
    grown = [
        cache_size(layers, 101, torch.bfloat16) - cache_size(layers, 100, torch.bfloat16) for layers in (own, other)
    ]
    # Two key-value heads of 16 channels, keys and values, 2 bytes; one and three layers of attention.
    assert grown == [2 * 16 * 2 * 2, 3 * 2 * 16 * 2 * 2]
    # Four heads of 16 × 16 states in float32; convolution of width 4 over x, B and C of 64 channels each.
    constant = 2 * (4 * 16 * 16 * 4 + 4 * 3 * 64 * 2)
    assert cache_size(own, 0, torch.bfloat16) == constant
    first = smaller_from(own, other, 512, torch.bfloat16)
    assert first == constant // (2 * 128) + 1
    assert smaller_from(own, other, first, torch.bfloat16) == first
    assert smaller_from(own, other, first - 1, torch.bfloat16) is None


def test_the_context_from_which_a_cache_is_smaller_lasts() -> None:
    state, window, whole = LayerCache(state=250), LayerCache(per_token=4, window=65), LayerCache(per_token=1)
    # 1,000 bytes against 16 per token of at most 64 tokens, which is 1,024 bytes from 64 tokens on.
    assert smaller_from([state], [window], 1000, torch.float32) == 63
    # And against 4 bytes per token: smaller from 251 tokens on.
    assert smaller_from([state], [whole], 1000, torch.float32) == 251
    # A window is the larger one only until the other has caught up: both are 1,024 bytes at 256 tokens.
    assert smaller_from([window], [whole], 1000, torch.float32) == 257
    assert smaller_from([whole], [window], 1000, torch.float32) is None
    assert smaller_from([whole], [window], 200, torch.float32) == 1


def test_what_is_not_known_is_refused_with_its_name() -> None:
    with pytest.raises(ModelError, match=r"asked: +rwkv\s+found: +wkv\s+allowed: attention, mamba2"):
        cache_layers(layout_of(meta_model(SPECIMENS["rwkv"].model().config)))
