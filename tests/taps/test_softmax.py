"""The tap `mixing` on softmax attention, against the probabilities that eager attention itself returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xarch_kd.errors import TapError
from xarch_kd.mixing.softmax import SoftmaxMixing
from xarch_kd.taps.layout import layout_of
from xarch_kd.taps.softmax import AttentionCall
from xarch_kd.taps.trace import trace

# The attention half of a block that mixes tokens twice.
SECOND = {
    "falcon_h1": {"blocks": "model.layers", "mixer": "self_attn"},
    "zamba": {"blocks": "model.layers", "mixer": "shared_transf.self_attn|mamba"},
    "zamba2": {"blocks": "model.layers", "mixer": "shared_transformer.self_attn|mamba"},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-odd-heads": ("llama", {"head_dim": 24}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "granite": ("granite", {}),
    "gpt2": ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt2-by-layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "gpt2-upcast": (
        "gpt2",
        {"reorder_and_upcast_attn": True, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi": ("phi", {}),
    "phi-normed": ("phi", {"qk_layernorm": True}),
    "opt": ("opt", {"dropout": 0.0}),
    "cohere": ("cohere", {}),
    "cohere-normed": ("cohere", {"use_qk_norm": True}),
    "gpt_oss": ("gpt_oss", {}),
    **{
        family: (family, {})
        for family in (
            "bamba",
            "granitemoehybrid",
            "qwen3_5_text",
            "qwen3_5_moe_text",
            "qwen3_next",
            "olmo_hybrid",
            "falcon_h1",
            "lfm2",
            "lfm2_moe",
            "lfm3",
            "zamba",
            "zamba2",
            "recurrent_gemma",
            "nemotron_h",
            "jamba",
            "minimax",
            "kimi_linear",
        )
    },
}
EPSILON = torch.finfo(torch.float32).eps


def right_padded(input_ids):
    mask = torch.ones_like(input_ids)
    mask[1, -4:] = 0
    return mask


def left_padded(input_ids):
    return right_padded(input_ids).flip(1)


def attention_layers(layout):
    return [layer for layer, kind in enumerate(layout.mixer_kinds) if kind == "attention"]


def attentions_of(model, input_ids, attention_mask):
    """Return the attention probabilities of each block's mixer."""
    found: dict[int, Any] = {}
    handles = []
    for layer, mixer in enumerate(layout_of(model, SECOND.get(model.config.model_type)).mixers):
        handles.append(mixer.register_forward_hook(lambda _, __, output, layer=layer: found.setdefault(layer, output)))
    with torch.no_grad():
        model(input_ids, attention_mask=attention_mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return {layer: output[1] for layer, output in found.items() if isinstance(output, tuple)}


def first_mixing(model, input_ids, attention_mask=None) -> SoftmaxMixing:
    mixing = trace(model, input_ids, attention_mask, taps=["mixing"], layers=[0]).at("mixing", 0)
    assert isinstance(mixing, SoftmaxMixing)
    return mixing


def largest_score(mixing):
    """max |scale · q·k| over all pairs, by the norms."""
    return (mixing.query.norm(dim=-1).max() * mixing.key.norm(dim=-1).max() * abs(mixing.scale)).item()


@pytest.mark.parametrize(
    ("mask", "training"),
    [(None, False), (right_padded, False), (left_padded, False), (left_padded, True)],
    ids=["no-mask", "right", "left", "left-train"],
)
@pytest.mark.parametrize("case", CASES)
def test_dense_equals_the_probabilities_of_eager_attention(case, training, mask, build, input_ids):
    model_type, overrides = CASES[case]
    model = build(model_type, attn_implementation="eager", **overrides).train(training)
    attention_mask = mask and mask(input_ids)
    layout = layout_of(model, SECOND.get(model_type))
    layers = attention_layers(layout)
    expected = attentions_of(model, input_ids, attention_mask)
    with torch.no_grad():
        found = trace(layout, input_ids, attention_mask, taps=["mixing"], layers=layers)["mixing"]
    assert list(found) == layers and layers
    for layer, mixing in found.items():
        rows = mixing.valid_mask()[:, None, :, None]
        # A score of dim d is rounded in d sums of products, in either order, and a probability by its exponent.
        bound = 2 * EPSILON * (1 + largest_score(mixing))
        assert ((mixing.dense() - expected[layer]) * rows).abs().max().item() <= bound
        assert not (mixing.dense() * ~rows).any()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "gpt2", "opt"])
def test_the_first_block_is_read_alike_whatever_implementation_the_model_uses(model_type, build, input_ids):
    overrides = {"sliding_window": 5} if model_type == "mistral" else {}
    models = [build(model_type, attn_implementation=name, **overrides) for name in ("eager", "sdpa")]
    mask = left_padded(input_ids)
    first, second = (first_mixing(model, input_ids, mask) for model in models)
    assert torch.equal(first.query, second.query) and torch.equal(first.key, second.key)
    for name in ("scale", "causal", "window", "softcap"):
        assert getattr(first, name) == getattr(second, name)


def test_what_shapes_the_scores_is_in_the_mixing(build, input_ids):
    def first(model_type, **overrides):
        return first_mixing(build(model_type, **overrides), input_ids)

    granite, gemma, oss, gpt2 = first("granite"), first("gemma2"), first("gpt_oss"), first("gpt2")
    assert (granite.scale, granite.window, granite.softcap, granite.sinks) == (0.4, None, None, None)
    assert (gemma.window, gemma.softcap) == (8, 50.0)
    assert oss.window == 8 and oss.sinks is not None and oss.sinks.shape == (4,)
    assert (gpt2.heads, gpt2.scale) == (4, 0.25)
    llama = first("llama")
    assert (llama.query.shape, llama.key.shape) == ((2, 13, 4, 16), (2, 13, 2, 16))
    assert llama.valid_range is None and llama.causal


def test_a_window_as_long_as_the_sequence_is_none(build, input_ids):
    windows = [first_mixing(build("mistral", sliding_window=size), input_ids).window for size in (12, 13, 14)]
    assert windows == [12, None, None]


def test_padding_bounds_the_tokens_that_count(build, input_ids):
    mask = right_padded(input_ids) * torch.tensor([[0, 0] + [1] * 11])
    mixing = first_mixing(build("llama"), input_ids, mask)
    assert mixing.valid_range is not None and mixing.valid_range.tolist() == [[2, 13], [2, 9]]


def test_a_sequence_of_padding_alone_has_no_rows(build, input_ids):
    mask = torch.ones_like(input_ids)
    mask[0] = 0
    mixing = trace(build("llama"), input_ids, mask, taps=["mixing"], layers=[1]).at("mixing", 1)
    assert not mixing.dense()[0].any() and mixing.dense()[1].sum(-1).allclose(torch.ones(4, 13))


def test_a_mask_with_holes_is_refused(build, input_ids):
    mask = torch.ones_like(input_ids)
    mask[1, 5] = 0
    with pytest.raises(TapError, match="padding between tokens"):
        trace(build("llama"), input_ids, mask, taps=["mixing"])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_masks_than_a_mixing_holds_are_refused(implementation, build, input_ids):
    model = build("llama", attn_implementation=implementation)
    seen = torch.ones(2, 1, 13, 13, dtype=torch.bool).tril()
    cases = {"sees the future": seen | torch.ones_like(seen).triu().tril(1), "packed": seen.clone()}
    cases["packed"][:, :, 6:, :6] = False
    for wrong in cases.values():
        mask = wrong if implementation == "sdpa" else torch.where(wrong, 0.0, torch.finfo(torch.float32).min)
        model.model.layers[1].self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
        trace(model, input_ids, taps=["mixing"], layers=[0])
        with pytest.raises(TapError, match="LlamaAttention masks in a way that a softmax mixing does not hold"):
            trace(model, input_ids, taps=["mixing"], layers=[1])
        model.model.layers[1].self_attn._forward_pre_hooks.clear()


@pytest.mark.parametrize("row", [4, 8, 12])
def test_a_mask_is_compared_in_the_first_middle_and_last_row_that_counts(row):
    padding = torch.ones(1, 13, dtype=torch.long)
    padding[0, :4] = 0
    mask = torch.ones(1, 1, 13, 13, dtype=torch.bool).tril() & (padding[:, None, None, :] > 0)
    fields = {"query": torch.zeros(1, 2, 13, 4), "key": torch.zeros(1, 2, 13, 4), "arguments": {}}
    call = AttentionCall(module=torch.nn.Identity(), mask=mask.clone(), implementation="sdpa", **fields)
    assert call.mixing(padding).time == 13
    mask[0, 0, row, row] = False
    call = AttentionCall(module=torch.nn.Identity(), mask=mask, implementation="sdpa", **fields)
    with pytest.raises(TapError, match="masks in a way"):
        call.mixing(padding)


@pytest.mark.parametrize(
    ("arguments", "keys", "found"),
    [({"position_bias": torch.zeros(1)}, 5, "an argument position_bias"), ({}, 7, "a cache or a prefix")],
)
def test_scores_of_another_form_are_refused(arguments, keys, found):
    call = AttentionCall(
        module=torch.nn.Identity(),
        query=torch.zeros(1, 2, 5, 4),
        key=torch.zeros(1, 2, keys, 4),
        mask=None,
        implementation="sdpa",
        arguments=arguments,
    )
    with pytest.raises(TapError, match="not those of one pass of plain attention") as caught:
        call.mixing(None)
    assert found in str(caught.value)


def test_a_call_without_arguments_is_causal_attention_scaled_by_its_width():
    call = AttentionCall(
        module=torch.nn.Identity(),
        query=torch.zeros(1, 2, 5, 16),
        key=torch.zeros(1, 2, 5, 16),
        mask=None,
        implementation="sdpa",
        arguments={"sliding_window": 3},
    )
    mixing = call.mixing(None)
    # Without a mask only flash attention applies a window.
    assert (mixing.scale, mixing.causal, mixing.window) == (0.25, True, None)
    flash = AttentionCall(**{**vars(call), "implementation": "flash_attention_2"}).mixing(None)
    assert isinstance(flash, SoftmaxMixing) and flash.window == 3


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neo", "gptj", "falcon", "mpt", "codegen"])
def test_a_family_that_never_calls_the_interface_is_refused(model_type, build, input_ids):
    sizes = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_inner": 96, "rotary_dim": 8, "n_positions": 64}
    overrides = {
        "gpt_neo": {
            "attention_types": [[["global", "local", "global"], 1]],
            "num_layers": 3,
            "num_heads": 4,
            "max_position_embeddings": 64,
        },
        "gptj": sizes,
        "codegen": sizes,
        "bloom": {"n_layer": 3, "n_head": 4},
        "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 3},
    }.get(model_type, {})
    model = build(model_type, **overrides)
    mixer = {"bloom": "self_attention", "falcon": "self_attention"}.get(model_type, "attn")
    blocks = "transformer.blocks" if model_type == "mpt" else "transformer.h"
    paths = {"blocks": blocks, "mixer": mixer, "embedding": None}
    with pytest.raises(TapError, match="does not call transformers' AttentionInterface"):
        trace(model, input_ids, taps=["mixing"], paths=paths)
