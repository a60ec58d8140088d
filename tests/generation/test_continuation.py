"""Continuations of text prompts."""

from __future__ import annotations

import pytest

from xarch_kd.errors import UsageError
from xarch_kd.generation.continuation import continuations
from xarch_kd.generation.sampling import Sampling, sample
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ("ab c", "d", "efg")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_the_decoded_samples_of_the_prompts(temperature: float) -> None:
    model, tokenizer = tiny_model("bamba", seed=3), tiny_tokenizer()
    sampling = Sampling(max_new_tokens=6, temperature=temperature)
    texts = continuations(model, tokenizer, PROMPTS, sampling, seed=2)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        (tokens,) = sample(model, [tokenizer(prompt)["input_ids"]], sampling, seed=2).completions()
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_prompt_without_tokens_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Prompt 1 holds no token"):
        continuations(tiny_model("llama"), tiny_tokenizer(), ["a", ""], Sampling(max_new_tokens=2))
