"""How a causal language model goes on from a prompt."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.errors import UsageError

# Model types without attention whose own cache works; a hybrid class without attention fails with one.
ATTENTION_FREE = ("falcon_mamba", "mamba", "mamba2")


def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Return the text that `model` writes after `prompt`: at most `tokens` tokens, ended by an end-of-text token.

    `temperature` 0 takes the likeliest token each time; above 0 it samples with `seed`, and torch's own random state
    is left as it was. A model whose blocks are all recurrent runs without a cache, since the stock classes fail with
    one. Raises UsageError for an empty prompt or no tokens.
    """
    if tokens < 1 or temperature < 0:
        raise UsageError(
            "A continuation needs at least one token and a temperature of 0 or more.",
            asked=f"tokens {tokens}, temperature {temperature}",
        )
    encoded = tokenizer(prompt, return_tensors="pt")
    input_ids: torch.Tensor = encoded["input_ids"]
    if input_ids.numel() == 0:
        raise UsageError("The prompt holds no token.", asked=repr(prompt))
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0 if temperature else None,
        use_cache=caches(model),
        eos_token_id=model.generation_config.eos_token_id if model.generation_config else None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            input_ids.to(model.device),
            attention_mask=encoded["attention_mask"].to(model.device),
            generation_config=settings,
        )
    written = tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
    return written if isinstance(written, str) else "".join(written)


def caches(model: PreTrainedModel) -> bool:
    """Tell whether `model` can generate with its cache: a hybrid class needs at least one attention block for it."""
    kinds = getattr(model.config, "layer_types", None)
    if kinds is None or model.config.model_type in ATTENTION_FREE:
        return True
    return any(kind.endswith("attention") and kind != "linear_attention" for kind in kinds)
