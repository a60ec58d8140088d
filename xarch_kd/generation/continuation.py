"""Continuations of text prompts by a causal language model."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.generation.sampling import Sampling, sample


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    seed: int = 0,
) -> list[str]:
    """Return the text that `model` writes after each prompt, without special tokens, as `sample` draws it.

    Raises UsageError as `sample` does, e.g. for a prompt without tokens.
    """
    encoded = tokenizer(list(prompts))["input_ids"]
    samples = sample(model, encoded, sampling, seed=seed)
    decoded = tokenizer.batch_decode(samples.completions(), skip_special_tokens=True)
    return [str(text) for text in decoded]
