"""Traces against direct calls of the modules; early stop, and no traces left in the model."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.taps.hands import RECURRENT, close, count_calls, taps_of
from xarch_kd.errors import TapError
from xarch_kd.taps.families import FAMILIES
from xarch_kd.taps.layout import head_logits, layout_of
from xarch_kd.taps.trace import trace

# Per family: the norm before the mixer, the norm before the MLP, the norm after the MLP, each an attribute of a block.
NORMS = {
    **dict.fromkeys(FAMILIES, ("input_layernorm", "post_attention_layernorm", None)),
    **dict.fromkeys(
        ("gemma2", "gemma3_text"), ("input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    ),
    **dict.fromkeys(("olmo2", "olmo3"), (None, None, "post_feedforward_layernorm")),
    **dict.fromkeys(("cohere", "phi"), ("input_layernorm", "input_layernorm", None)),
    **dict.fromkeys(("lfm2", "lfm2_moe"), ("operator_norm", "ffn_norm", None)),
    "lfm3": ("operator_norm", "ffn_norm", "post_ffn_norm"),
    "gpt2": ("ln_1", "ln_2", None),
    "opt": ("self_attn_layer_norm", None, None),
    "bamba": ("input_layernorm", "pre_ff_layernorm", None),
    "jamba": ("input_layernorm", "pre_ff_layernorm", None),
    "recurrent_gemma": ("temporal_pre_norm", "channel_pre_norm", None),
    **dict.fromkeys((*RECURRENT, "nemotron_h"), ("norm", None, None)),
    "rwkv": ("ln1", "ln2", None),
}
MLPS = {
    **dict.fromkeys(("bamba", "jamba", "lfm2", "lfm2_moe", "lfm3", "rwkv"), "feed_forward"),
    "granitemoehybrid": "shared_mlp",
    "recurrent_gemma": "mlp_block",
}
# The MLP's input is the mixer's.
PARALLEL = ("cohere", "phi")
# Blocks that mix twice, or that are no sum of what enters and what is added; they have tests of their own.
OWN_FORM = ("falcon_h1", "zamba", "zamba2", "minimax")


def padded(input_ids):
    mask = torch.ones_like(input_ids)
    mask[1, -4:] = 0
    return mask


@pytest.mark.parametrize("mask", [None, padded], ids=["no-mask", "padded"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_hidden_embedding_and_head_input_equal_what_the_model_itself_returns(model_type, mask, build, input_ids):
    model = build(model_type)
    attention_mask = mask and mask(input_ids)
    at_head = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: at_head.append(args[0]))
    with torch.no_grad():
        output = model(input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
        handle.remove()
        found = trace(model, input_ids, attention_mask, taps=["embedding", "hidden", "head_input"])
    states = list(output.hidden_states)
    if model_type in (*RECURRENT, "rwkv"):
        states.insert(0, model.get_input_embeddings()(input_ids))
    count = model.config.num_hidden_layers
    assert list(found["hidden"]) == list(range(count))
    assert torch.equal(found["embedding"], states[0])
    for layer in range(count - 1):
        assert torch.equal(found["hidden"][layer], states[layer + 1])
    layout = layout_of(model)
    assert layout.final_norm is not None
    # The tuple's last entry is after the final norm.
    assert torch.equal(layout.final_norm(found["hidden"][count - 1]), states[-1])
    assert torch.equal(found["head_input"], at_head[0])


@pytest.mark.parametrize("model_type", [family for family in FAMILIES if family not in OWN_FORM])
def test_taps_inside_a_block_equal_calls_of_its_modules_by_hand(model_type, build, input_ids):
    model = build(model_type)
    multiplier = getattr(model.config, "residual_multiplier", 1.0)
    with torch.no_grad():
        found = trace(model, input_ids, taps=taps_of(model_type))
        entering = found["embedding"]
        for layer, block in enumerate(layout_of(model).blocks):
            # The linear layers of an OLMo hybrid are of Llama's form, its attention layers of OLMo 2's.
            if model_type == "olmo_hybrid" and hasattr(block, "self_attn"):
                before_mixer, before_mlp, after_mlp = NORMS["olmo2"]
            else:
                before_mixer, before_mlp, after_mlp = NORMS[model_type]
            # The first block of an RWKV norms what enters before it is added to.
            first_norm = getattr(block, "pre_ln", None)
            entering = entering if first_norm is None else first_norm(entering)
            expected_input = getattr(block, before_mixer)(entering) if before_mixer else entering
            assert torch.equal(found["mixer_input"][layer], expected_input)
            leaving = entering + found["mixer_output"][layer]
            if "mlp_output" in found:
                is_parallel = model_type in PARALLEL or getattr(block, "use_parallel_residual", False)
                mlp_entering = entering if is_parallel else leaving
                mlp_input = getattr(block, before_mlp)(mlp_entering) if before_mlp else mlp_entering
                mlp_output = getattr(block, MLPS.get(model_type, "mlp"))(mlp_input)
                mlp_output = mlp_output[0] if isinstance(mlp_output, tuple) else mlp_output
                mlp_output = getattr(block, after_mlp)(mlp_output) if after_mlp else mlp_output
                assert close(found["mlp_output"][layer], mlp_output * multiplier)
                leaving = leaving + found["mlp_output"][layer]
            if model_type != "opt":  # its MLP is part of the block
                assert close(found["hidden"][layer], leaving)
            entering = found["hidden"][layer]


def test_the_mixer_output_of_a_falcon_h1_is_what_its_recurrent_half_adds(build, input_ids):
    model = build("falcon_h1", ssm_out_multiplier=0.4, attention_in_multiplier=1.5, attention_out_multiplier=0.3)
    attended = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda _, __, output: attended.append(output[0]))
    with torch.no_grad():
        found = trace(model, input_ids, taps=["embedding", "hidden", "mixer_input", "mixer_output", "mlp_output"])
        block, mixer_input = model.model.layers[0], found["mixer_input"][0]
        assert torch.equal(mixer_input, block.input_layernorm(found["embedding"]))
        assert torch.equal(found["mixer_output"][0], block.mamba(mixer_input) * 0.4)
    added = found["mixer_output"][0] + attended[0] * 0.3 + found["mlp_output"][0]
    assert close(found["hidden"][0], found["embedding"] + added)


@pytest.mark.parametrize("model_type", ["zamba", "zamba2"])
def test_the_mixer_of_a_zamba_s_hybrid_block_is_its_recurrent_one(model_type, build, input_ids):
    with torch.no_grad():
        found = trace(build(model_type), input_ids, taps=["embedding", "hidden", "mixer_output"])
    assert close(found["hidden"][0], found["embedding"] + found["mixer_output"][0])
    assert close(found["hidden"][1], found["hidden"][0] + found["mixer_output"][1])


def test_the_outputs_of_a_minimax_are_scaled_by_kind_of_mixer(build, input_ids):
    factors = {"linear_attn_beta_factor": 0.5, "full_attn_beta_factor": 0.7, "mlp_beta_factor": 0.9}
    model = build("minimax", **factors, linear_attn_alpha_factor=2.0, full_attn_alpha_factor=3.0, mlp_alpha_factor=4.0)
    with torch.no_grad():
        found = trace(model, input_ids, taps=["hidden", "mixer_input", "mixer_output", "mlp_output"])
        for layer, alpha in enumerate((2.0, 3.0)):
            block = model.model.layers[layer]
            # The residual of a MiniMax is taken after the norm.
            middle = block.post_attention_layernorm(found["mixer_input"][layer] * alpha + found["mixer_output"][layer])
            assert close(found["hidden"][layer], middle * 4.0 + found["mlp_output"][layer])


def test_a_block_whose_mlp_is_added_to_experts_has_no_mlp_output(build, input_ids):
    model = build("granitemoehybrid", num_local_experts=4, num_experts_per_tok=2)
    assert layout_of(model).mlps is None
    with pytest.raises(TapError, match="has no tap mlp_output: its family's table names no MLP"):
        trace(model, input_ids, taps=["mlp_output"])


def test_the_mixer_output_of_llama_equals_attention_called_by_hand(build, input_ids):
    model = build("llama")
    with torch.no_grad():
        found = trace(model, input_ids, taps=["mixer_input", "mixer_output"], layers=[1])
        mixer_input = found["mixer_input"][1]
        positions = torch.arange(input_ids.shape[1])[None]
        rotary = model.model.rotary_emb(mixer_input, position_ids=positions)
        attention = model.model.layers[1].self_attn
        expected, _ = attention(
            hidden_states=mixer_input, position_embeddings=rotary, attention_mask=None, is_causal=True
        )
    assert torch.equal(found["mixer_output"][1], expected)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_the_mixer_output_of_a_recurrent_model_equals_its_mixer_called_by_hand(model_type, build, input_ids):
    model = build(model_type)
    with torch.no_grad():
        found = trace(model, input_ids, taps=["mixer_input", "mixer_output"], layers=[2])
        expected = model.backbone.layers[2].mixer(found["mixer_input"][2])
    assert torch.equal(found["mixer_output"][2], expected)


@pytest.mark.parametrize(("model_type", "dropout"), [("phi3", "resid_pdrop"), ("gpt_neox", "hidden_dropout")])
def test_outputs_are_what_joins_the_residual_sum_under_dropout_too(model_type, dropout, build, input_ids):
    model = build(model_type, **{dropout: 0.5}).train()
    torch.manual_seed(0)
    found = trace(model, input_ids, taps=["embedding", "hidden", "mixer_output", "mlp_output"], layers=[0])
    assert (found["mixer_output"][0] == 0).any()
    assert close(found["hidden"][0], found["embedding"] + found["mixer_output"][0] + found["mlp_output"][0])


@pytest.mark.parametrize("model_type", [*FAMILIES, "cohere2"])
def test_the_head_s_formula_gives_the_model_s_own_logits(model_type, build, input_ids):
    model = build(model_type)
    paths = None if model_type in FAMILIES else {"blocks": "model.layers", "mixer": "self_attn"}
    layout = layout_of(model, paths)
    with torch.no_grad():
        expected = model(input_ids).logits
        actual = head_logits(layout, trace(layout, input_ids, taps=["head_input"])["head_input"])
    assert close(actual, expected)


@pytest.mark.parametrize(
    ("taps", "layers", "expected"),
    [
        (["hidden"], [0], [1, 0, 0]),
        (["mixer_input"], [1], [1, 1, 0]),
        (["mlp_output", "mixer_output"], [0, 1], [1, 1, 0]),
        ({"hidden": [0], "mixer_output": [1]}, None, [1, 1, 0]),
        ({"hidden": None}, [0], [1, 0, 0]),
        (["hidden", "embedding"], [2], [1, 1, 1]),
        (["embedding"], None, [0, 0, 0]),
        (["hidden", "head_input"], [0], [1, 1, 1]),
    ],
)
def test_the_pass_stops_after_the_last_block_that_is_read_and_never_runs_the_head(
    taps, layers, expected, build, input_ids
):
    model = build("llama")
    calls = count_calls([*model.model.layers, model.lm_head])
    trace(model, input_ids, taps=taps, layers=layers)
    assert calls == [*expected, 0]


@pytest.mark.parametrize("model_type", ["bamba", "mamba", "mamba2"])
def test_the_pass_of_a_student_stops_too(model_type, build, input_ids):
    model = build(model_type)
    layout = layout_of(model)
    calls = count_calls([*layout.blocks, model.lm_head])
    trace(model, input_ids, taps=["hidden"], layers=[1])
    assert calls == [1, 1, 0, 0]


def test_hooks_are_removed_after_a_pass(build, input_ids, count_hooks):
    model = build("bamba")
    for taps in (taps_of("bamba"), ["embedding"], ["hidden"]):
        trace(model, input_ids, taps=taps)
        assert count_hooks(model) == 0


def test_hooks_are_removed_after_an_exception_inside_a_block(build, input_ids, count_hooks, monkeypatch):
    model = build("llama")

    def broken(*_):
        raise ZeroDivisionError("in the middle of a block")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", broken)
    with pytest.raises(ZeroDivisionError, match="in the middle"):
        trace(model, input_ids, taps=taps_of("llama"))
    assert count_hooks(model) == 0


def test_hooks_are_removed_after_an_exception_before_the_blocks(build, input_ids, count_hooks):
    model = build("llama")
    with pytest.raises(IndexError):
        trace(model, input_ids + 1000, taps=taps_of("llama"))
    assert count_hooks(model) == 0


@pytest.mark.parametrize(
    "taps", [{"mixer_output": [1]}, {"mixer_output": [1], "head_input": None}], ids=["stop", "whole"]
)
@pytest.mark.parametrize("model_type", ["llama", "bamba", "mamba", "mamba2"])
def test_nothing_that_was_not_asked_for_is_kept_alive(model_type, taps, build, input_ids):
    model = build(model_type)
    seen = []

    def watch(_, args, output):
        tensors = [output] if isinstance(output, torch.Tensor) else [x for x in output if isinstance(x, torch.Tensor)]
        seen.extend(weakref.ref(tensor) for tensor in tensors)

    for module in layout_of(model).base.modules():
        if module is not layout_of(model).base:
            module.register_forward_hook(watch)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            found = trace(model, input_ids, taps=taps)
        alive = [reference() for reference in seen if reference() is not None]
    finally:
        gc.enable()
    asked = [found.at(tap, layers[0] if layers else None) for tap, layers in taps.items()]
    assert len(seen) > 8
    assert {id(tensor) for tensor in alive} == {id(tensor) for tensor in asked}
