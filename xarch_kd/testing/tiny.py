"""Tiny random models and a tiny tokenizer, built from configs in milliseconds; imported by tests and benchmarks only.

Norm weights and biases are non-trivial and attention is far from uniform, so that a missing, swapped or wrongly folded
weight changes the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 97
# Scaled rotary positions, and partial ones (half of a head).
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_GPT_NEOX = {key: value for key, value in _TRANSFORMER.items() if key != "num_key_value_heads"}
_RECURRENT: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 16, "tie_word_embeddings": False}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.4,
    "logits_scaling": 2.0,
}
_BAMBA = {
    "attn_layer_indices": [1],
    "mamba_n_heads": 4,
    "mamba_n_groups": 4,
    "mamba_d_state": 16,
    "mamba_expand": 1,
    "mamba_chunk_size": 16,
}

_WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]

# Models that were built in this process, oldest first.
MOST_BUILT = 64
_BUILT: dict[str, PreTrainedModel] = {}

# Sizes beyond the config class's own defaults, by `model_type`.
SIZES: dict[str, dict[str, Any]] = {
    "llama": _TRANSFORMER,
    "mistral": {**_TRANSFORMER, "sliding_window": None},
    "qwen2": _TRANSFORMER,
    "qwen3": {**_TRANSFORMER, "head_dim": 16},
    "phi3": _TRANSFORMER,
    "granite": {**_TRANSFORMER, **_GRANITE},
    "smollm3": {**_TRANSFORMER, "num_hidden_layers": 4},
    "gemma": {**_TRANSFORMER, "head_dim": 16},
    "gemma2": {**_TRANSFORMER, "head_dim": 16, "layer_types": _WINDOWED, "sliding_window": 8},
    "gemma3_text": {**_TRANSFORMER, "head_dim": 16, "layer_types": _WINDOWED, "sliding_window": 8},
    "olmo": _TRANSFORMER,
    "olmo2": _TRANSFORMER,
    "olmo3": {**_TRANSFORMER, "layer_types": _WINDOWED, "sliding_window": 8},
    "cohere": {**_TRANSFORMER, "logit_scale": 0.25},
    "gpt_oss": {
        **_TRANSFORMER,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": _WINDOWED,
        "sliding_window": 8,
    },
    "phi": _TRANSFORMER,
    "opt": {**_GPT_NEOX, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gpt_neox": _GPT_NEOX,
    "bamba": {**_TRANSFORMER, **_BAMBA},
    "mamba": {**_RECURRENT, "expand": 2},
    "mamba2": {**_RECURRENT, "expand": 2, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Return a config of `model_type` with hidden size 64, 3 or 4 layers and 97 tokens; `overrides` replace sizes."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return AutoConfig.for_model(model_type, **{**tokens, **SIZES[model_type], **overrides})


def tiny_model(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a float32 model of `tiny_config(model_type, **overrides)` in eval mode, the same for the same seed."""
    return seeded_model(lambda: tiny_config(model_type, **overrides), _perturb, seed, (model_type, overrides))


def seeded_model(
    config: Callable[[], PreTrainedConfig],
    perturb: Callable[[str, nn.Parameter], None],
    seed: int,
    key: tuple[object, ...],
) -> PreTrainedModel:
    """Return a float32 model of `config()` in eval mode, whose parameters `perturb` has set.

    The model of a `key` is built once and copied, which takes a third of the time.
    """
    name = repr((perturb.__module__, seed, key, torch.get_default_device()))
    if name not in _BUILT:
        while len(_BUILT) >= MOST_BUILT:
            _BUILT.pop(next(iter(_BUILT)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    perturb(parameter_name, parameter)
        _BUILT[name] = model.eval()
    return copy.deepcopy(_BUILT[name])


def _perturb(name: str, parameter: nn.Parameter) -> None:
    """Set a parameter to random values of the magnitude of a trained model's."""
    if name.endswith(("A_log", ".D")):
        return
    if parameter.ndim == 1:
        parameter.add_(0.2 * torch.randn_like(parameter))
        return
    is_embedding = any(part in name for part in ("embed", "wte", "wpe"))
    sharpens = any(part in name for part in ("q_proj", "k_proj"))
    fan_in = 1 if is_embedding else parameter[0].numel()
    parameter.copy_(torch.randn_like(parameter) * fan_in**-0.5 * (2.0 if sharpens else 1.0))


def tiny_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character: `<|end|>`, newline, then ASCII 32 to 126; others become `?`.

    A different `vocabulary` truncates the table or pads it with unused tokens.
    """
    characters = ["<|end|>", "\n", *map(chr, range(ord("?"), ord("?") + 1))]
    characters += [chr(code) for code in range(32, 127) if chr(code) != "?"]
    filler = [f"<|filler-{index}|>" for index in range(vocabulary - len(characters))]
    table = {token: index for index, token in enumerate([*characters, *filler][:vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>", unk_token="?"
    )
