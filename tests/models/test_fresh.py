from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from xarch_kd.models.fresh import FreshConfigError, config_fields, fresh_config
from xarch_kd.models.loading.load import fresh_model
from xarch_kd.testing.tiny import tiny_config

MAMBA2: dict[str, Any] = {
    "model_type": "mamba2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "expand": 2,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}


def problems_of(**values: Any) -> list[tuple[str | None, str]]:
    with pytest.raises(FreshConfigError) as caught:
        fresh_config(values, tiny_config("llama"))
    return [(problem.key, problem.message) for problem in caught.value.problems]


def test_tokens_are_the_teachers_and_the_head_is_tied_unless_it_is_said() -> None:
    teacher = tiny_config("llama", vocab_size=61, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
    config = fresh_config(MAMBA2, teacher)
    shared = (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert shared == (61, 3, [4, 5], 6)
    assert config.tie_word_embeddings is True
    own = fresh_config({**MAMBA2, "vocab_size": 64, "pad_token_id": 0, "tie_word_embeddings": False}, teacher)
    assert (own.vocab_size, own.bos_token_id, own.pad_token_id, own.tie_word_embeddings) == (64, 3, 0, False)
    # The class's own defaults differ, so nothing of the above is theirs.
    defaults = {name: config_fields("mamba2")[name].default for name in ("vocab_size", "bos_token_id", "pad_token_id")}
    assert defaults == {"vocab_size": 32768, "bos_token_id": 0, "pad_token_id": 1}
    assert config_fields("mamba2")["tie_word_embeddings"].default is False


@pytest.mark.parametrize(
    "values",
    [
        MAMBA2,
        LLAMA,
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "layer_norm_epsilon": 1},
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
        {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        {**MAMBA2, "time_step_limit": (0, math.inf)},
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    ],
)
def test_a_model_of_it_runs(values: dict[str, Any]) -> None:
    model = fresh_model(fresh_config(values, tiny_config("llama")), seed=0)
    logits = model(input_ids=torch.arange(12)[None]).logits
    assert logits.shape == (1, 12, 97) and bool(torch.isfinite(logits).all())
    head: Any = model.get_output_embeddings()
    assert model.get_input_embeddings().weight is head.weight


CASES: dict[str, tuple[dict[str, Any], list[tuple[str | None, str]]]] = {
    "misspelt": (
        {**MAMBA2, "hiden_size": 64},
        [("hiden_size", "a mamba2 has no such key. Did you mean 'hidden_size'?")],
    ),
    "an alias": (
        {"model_type": "gpt2", "num_hidden_layer": 2},
        [("num_hidden_layer", "a gpt2 has no such key. Did you mean 'num_hidden_layers'?")],
    ),
    "no type": ({"hidden_size": 64}, [(None, "it needs a model_type, e.g. model_type: mamba2")]),
    "unknown type": (
        {"model_type": "mamba22"},
        [
            (
                "model_type",
                "transformers has no causal language model of this type, 'mamba22'. Did you mean 'mamba2'?",
            )
        ],
    ),
    "several models": (
        {"model_type": "gemma3"},
        [("model_type", "a gemma3 is made of several models; a student is one. Write model_type: gemma3_text")],
    ),
    "heads do not fill": (
        {**MAMBA2, "num_heads": 7},
        [
            (
                "num_heads",
                "hidden_size 32 × expand 2 is 64, but num_heads 7 × head_dim 8 is 56. What fits: num_heads: 8 with "
                "head_dim 8",
            )
        ],
    ),
    "heads not given": (
        {"model_type": "mamba2", "hidden_size": 256},
        [
            (
                "hidden_size",
                "hidden_size 256 × expand 2 is 512, but num_heads 128 × head_dim 64 is 8192. What fits: num_heads: 8 "
                "with head_dim 64",
            )
        ],
    ),
    "head width": (
        {**MAMBA2, "head_dim": 7},
        [
            (
                "num_heads",
                "hidden_size 32 × expand 2 is 64, but num_heads 8 × head_dim 7 is 56. What fits: head_dim: 8 with "
                "num_heads 8",
            )
        ],
    ),
    "neither": (
        {**MAMBA2, "hidden_size": 48, "head_dim": 7, "num_heads": 9},
        [
            (
                "num_heads",
                "hidden_size 48 × expand 2 is 96, but num_heads 9 × head_dim 7 is 63. What fits: num_heads: 3 with "
                "head_dim: 32",
            )
        ],
    ),
    "groups": (
        {**MAMBA2, "num_heads": 4, "head_dim": 16, "n_groups": 6},
        [("n_groups", "num_heads 4 is not a multiple of n_groups 6. What fits: n_groups: 2")],
    ),
    "key heads": (
        {**LLAMA, "num_key_value_heads": 4},
        [
            (
                "num_key_value_heads",
                "6 attention heads are not shared evenly by 4 key and value heads. What fits: num_key_value_heads of "
                "1, 2, 3, 6",
            )
        ],
    ),
    "attention heads": (
        {**LLAMA, "num_attention_heads": 7},
        [
            (
                "num_attention_heads",
                "a width of 48 is not made of 7 equal attention heads. What fits: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48",
            )
        ],
    ),
    "several at once": (
        {**MAMBA2, "expand": True, "num_hidden_layers": 2**40, "conv_kernel": "x", "use_bias": 3, "foo": 1},
        [
            ("num_hidden_layers", "no model has such a size"),
            ("expand", "must be a whole number, found true"),
            (
                "foo",
                f"a mamba2 has no such key. It has {', '.join(sorted(config_fields('mamba2')))}",
            ),
            ("conv_kernel", "must be a whole number, found 'x'"),
            ("use_bias", "must be true or false, found 3"),
        ],
    ),
    "too deep": (
        {**MAMBA2, "num_hidden_layers": 5000},
        [("num_hidden_layers", "must be at least 1 and at most 1024, found 5000")],
    ),
    "pad outside": (
        {**MAMBA2, "pad_token_id": 97},
        [("pad_token_id", "the pad_token_id is 97, outside a vocabulary of 97")],
    ),
    "no such function": (
        {**MAMBA2, "hidden_act": "bla"},
        [(None, "no mamba2 can be built with these values: KeyError: 'bla'")],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_told_at_its_key_with_what_fits(name: str) -> None:
    values, expected = CASES[name]
    assert problems_of(**values) == expected


@pytest.mark.parametrize(
    "key",
    ["auto_map", "trust_remote_code", "_attn_implementation", "_attn_implementation_internal", "attn_implementation",
     "dtype", "torch_dtype", "architectures", "quantization_config", "transformers_version", "_name_or_path"],
)  # fmt: skip
def test_keys_that_are_not_about_sizes_are_refused(key: str) -> None:
    (problem,) = problems_of(**MAMBA2, **{key: {"AutoModel": "code.Model"}})
    assert problem[0] == key and problem[1].startswith("this cannot be set in a mapping file: ")


def test_code_inside_an_inner_mapping_is_refused() -> None:
    rope = {"rope_type": "default", "inner": [{"auto_map": {"AutoModel": "code.Model"}}]}
    (problem,) = problems_of(**LLAMA, rope_parameters=rope)
    assert problem[0] == "rope_parameters" and "auto_map cannot be set in a mapping file" in problem[1]


def test_what_fits_does_fit() -> None:
    for name, mended in {
        "heads do not fill": {"num_heads": 8},
        "head width": {"head_dim": 8},
        "neither": {"num_heads": 3, "head_dim": 32, "n_groups": 3},
        "groups": {"n_groups": 2},
        "key heads": {"num_key_value_heads": 3},
        "attention heads": {"num_attention_heads": 12},
    }.items():
        fresh_config({**CASES[name][0], **mended}, tiny_config("llama"))
