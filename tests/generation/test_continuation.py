"""Continuations of a prompt."""

from __future__ import annotations

import pytest
import torch

from xarch_kd.errors import UsageError
from xarch_kd.generation.continuation import caches, continuation
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("model_type", ["llama", "bamba", "mamba2"])
def test_greedy_takes_the_likeliest_token_each_time(model_type: str) -> None:
    model, tokenizer = tiny_model(model_type, seed=3), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    text = "ab c"
    for _ in range(6):
        logits = model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1]
        text += str(tokenizer.decode(int(logits.argmax()), skip_special_tokens=True))
    assert continuation(model, tokenizer, "ab c", tokens=6) == text.removeprefix("ab c")


def test_sampling_is_the_seeds_and_leaves_torch_alone() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = torch.random.get_rng_state()
    drawn = [continuation(model, tokenizer, "ab", tokens=12, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_all_recurrent_hybrid_generates_without_a_cache() -> None:
    model = tiny_model("bamba", attn_layer_indices=[])
    assert not caches(model)
    assert isinstance(continuation(model, tiny_tokenizer(), "ab", tokens=4), str)


@pytest.mark.parametrize("model_type", ["llama", "bamba", "mamba", "mamba2"])
def test_the_other_classes_use_their_cache(model_type: str) -> None:
    assert caches(tiny_model(model_type))


@pytest.mark.parametrize(("prompt", "tokens", "temperature"), [("", 4, 0.0), ("a", 0, 0.0), ("a", 4, -1.0)])
def test_nothing_to_do_is_a_usage_error(prompt: str, tokens: int, temperature: float) -> None:
    with pytest.raises(UsageError):
        continuation(tiny_model("llama"), tiny_tokenizer(), prompt, tokens=tokens, temperature=temperature)
