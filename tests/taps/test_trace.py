from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from xarch_kd.errors import TapError, UsageError
from xarch_kd.taps.families import FAMILIES
from xarch_kd.taps.layout import head_logits, layout_of
from xarch_kd.taps.trace import trace

RECURRENT = ("mamba", "mamba2", "falcon_mamba")
WITHOUT_MLP = (*RECURRENT, "opt", "zamba", "zamba2", "nemotron_h")
BLOCK_TAPS = ("hidden", "mixer_input", "mixer_output", "mlp_output")

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
# One addition of three float32 terms in another order, at the size of the residual stream.
ROUNDINGS = 4 * torch.finfo(torch.float32).eps


def taps_of(model_type: str) -> list[str]:
    blocks = [tap for tap in BLOCK_TAPS if not (tap == "mlp_output" and model_type in WITHOUT_MLP)]
    return ["embedding", *blocks, "head_input"]


def close(actual, expected):
    return (actual - expected).abs().max().item() <= ROUNDINGS * max(1.0, expected.abs().max().item())


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
    with pytest.raises(TapError, match="have no MLP that is known"):
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


def count_calls(modules):
    """How often the forward of each module ran, kept up to date."""
    calls = [0] * len(modules)

    def counted(index, forward):
        def count(*args, **kwargs):
            calls[index] += 1
            return forward(*args, **kwargs)

        return count

    for index, module in enumerate(modules):
        module.forward = counted(index, module.forward)
    return calls


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


def test_gradients_flow_when_they_are_enabled_and_not_otherwise(build, input_ids):
    model = build("llama")
    trace(model, input_ids, taps=["mixer_output"], layers=[1])["mixer_output"][1].pow(2).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert model.model.layers[1].mlp.up_proj.weight.grad is None
    with torch.no_grad():
        assert not trace(model, input_ids, taps=["hidden"])["hidden"][0].requires_grad


def tap_gradients(model, input_ids, attention_mask=None):
    found = trace(model, input_ids, attention_mask, taps=taps_of(model.config.model_type))
    values = [
        value for tap in found for value in (found[tap].values() if isinstance(found[tap], dict) else [found[tap]])
    ]
    torch.stack([value.sin().mean() for value in values]).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model_type", ["llama", "granite", "gemma2", "bamba", "mamba", "mamba2"])
def test_tap_gradients_under_checkpointing_are_bit_equal(model_type, build, input_ids):
    plain, saving = build(model_type).train(), build(model_type).train()
    recomputed = count_calls([layout_of(saving).mixers[0]])
    saving.activation_checkpointing_enable({"use_reentrant": False})
    expected, actual = tap_gradients(plain, input_ids), tap_gradients(saving, input_ids)
    assert recomputed == [2]
    with_gradient = [name for name, gradient in expected.items() if gradient is not None]
    assert len(with_gradient) >= len(expected) - 1  # the head alone gets none
    for name in with_gradient:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("arguments", [{"use_reentrant": True}, {}], ids=["asked", "torch-default"])
def test_reentrant_checkpointing_is_refused_with_the_reason(arguments, build, input_ids, count_hooks):
    model = build("llama").train()
    model.activation_checkpointing_enable(arguments)
    hooks = count_hooks(model)
    with pytest.raises(TapError) as caught:
        trace(model, input_ids, taps=["hidden"])
    assert "would silently lose their gradients" in str(caught.value)
    assert 'enable it with {"use_reentrant": False}' in str(caught.value)
    assert count_hooks(model) == hooks


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_is_no_matter_where_no_gradient_is_taken(build, input_ids):
    model = build("llama")
    expected = trace(model, input_ids, taps=["mixer_output"])["mixer_output"]
    model.train().activation_checkpointing_enable({"use_reentrant": True})
    with torch.no_grad():
        actual = trace(model, input_ids, taps=["mixer_output"])["mixer_output"]
    assert all(torch.equal(actual[layer], expected[layer]) for layer in expected)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiling(test):
    """Dynamo looks at `.grad` of every input while it traces, and hides the warning in a way that errors undo."""
    ignore = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    return ignore(pytest.mark.usefixtures("fresh_compiler")(test))


@compiling
@pytest.mark.parametrize(("model_type", "in_place"), [("llama", False), ("llama", True), ("bamba", False)])
def test_taps_outside_compiled_blocks_and_their_gradients_equal_the_eager_ones(model_type, in_place, build, input_ids):
    eager, compiled = build(model_type), build(model_type)
    for index, block in enumerate(compiled.model.layers[:2]):
        if in_place:
            block.compile(backend="aot_eager")
        else:
            compiled.model.layers[index] = torch.compile(block, backend="aot_eager")
    # A pass before any hook exists: what is compiled then must not make later traces blind.
    compiled(input_ids)
    trace(compiled, input_ids, taps=["hidden"], layers=[0])
    taps = ["embedding", "hidden"]
    expected, actual = (trace(model, input_ids, taps=taps, layers=[0, 1]) for model in (eager, compiled))
    assert torch.equal(actual["embedding"], expected["embedding"])
    for layer in (0, 1):
        assert close(actual["hidden"][layer], expected["hidden"][layer])
    for found in (expected, actual):
        found["hidden"][1].sin().mean().backward()
    name = "feed_forward" if model_type == "bamba" else "mlp"
    first, second = (getattr(layout_of(model).blocks[0], name).up_proj.weight.grad for model in (eager, compiled))
    assert torch.allclose(first, second, rtol=1e-5, atol=ROUNDINGS)


@compiling
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("tap", ["mixer_input", "mixer_output", "mlp_output"])
def test_taps_inside_a_compiled_block_are_refused_with_the_reason(tap, in_place, build, input_ids):
    model = build("llama")
    block = model.model.layers[1]
    if in_place:
        block.compile(backend="aot_eager")
    else:
        model.model.layers[1] = torch.compile(block, backend="aot_eager")
    with pytest.raises(TapError, match="compiled code does not call hooks that are added later") as caught:
        trace(model, input_ids, taps=[tap])
    assert f"{tap} of block 1" in str(caught.value)
    trace(model, input_ids, taps=[tap], layers=[0])


@compiling
def test_taps_inside_blocks_can_be_read_when_the_mixers_are_compiled_instead(build, input_ids):
    eager, compiled = build("llama"), build("llama")
    for block in compiled.model.layers:
        block.self_attn = torch.compile(block.self_attn, backend="aot_eager")
    compiled(input_ids)
    expected, actual = (trace(model, input_ids, taps=["mixer_input", "mixer_output"]) for model in (eager, compiled))
    for layer in range(3):
        assert close(actual["mixer_output"][layer], expected["mixer_output"][layer])


@compiling
def test_a_model_compiled_as_a_whole_is_traced_uncompiled(build, input_ids):
    model = build("llama")
    expected = trace(model, input_ids, taps=["mixer_output"], layers=[1])
    compiled: Any = torch.compile(model, backend="aot_eager")
    actual = trace(compiled, input_ids, taps=["mixer_output"], layers=[1])
    assert torch.equal(actual["mixer_output"][1], expected["mixer_output"][1])


OUTSIDE = {
    "starcoder2": {"blocks": "model.layers", "mixer": "self_attn", "mlp": "mlp"},
    "persimmon": {"blocks": "model.layers", "mixer": "self_attn", "final_norm": "model.final_layernorm"},
    "biogpt": {"blocks": "biogpt.layers", "mixer": "self_attn", "final_norm": "biogpt.layer_norm"},
}


@pytest.mark.parametrize("model_type", OUTSIDE)
def test_a_family_outside_the_table_works_with_paths(model_type, build, input_ids):
    model = build(model_type)
    with pytest.raises(TapError, match=r"paths: \{blocks: model\.layers"):
        trace(model, input_ids, taps=["hidden"])
    with torch.no_grad():
        states = model(input_ids, output_hidden_states=True, use_cache=False).hidden_states
        taps = ["embedding", "hidden", "mixer_input", "mixer_output", "head_input"]
        found = trace(model, input_ids, taps=taps, paths=OUTSIDE[model_type])
    assert torch.equal(found["embedding"], states[0])
    assert torch.equal(found["hidden"][0], states[1])
    assert torch.equal(found["head_input"], states[-1])
    assert found["mixer_output"][1].shape == states[1].shape


def test_starcoder2_with_paths_yields_every_tap(build, input_ids):
    found = trace(build("starcoder2"), input_ids, taps=taps_of("starcoder2"), paths=OUTSIDE["starcoder2"])
    assert close(found["hidden"][0], found["embedding"] + found["mixer_output"][0] + found["mlp_output"][0])


def test_a_path_that_leads_nowhere_says_what_is_there(build, input_ids):
    with pytest.raises(TapError, match="found:   LlamaDecoderLayer with self_attn, mlp") as caught:
        trace(build("llama"), input_ids, taps=["hidden"], paths={"blocks": "model.layers", "mixer": "self_atn"})
    assert "Did you mean 'self_attn'?" in str(caught.value)


def test_a_path_to_something_other_than_a_list_of_blocks_is_refused(build, input_ids):
    with pytest.raises(TapError, match="does not lead to a list of blocks"):
        trace(build("llama"), input_ids, taps=["hidden"], paths={"blocks": "model.norm", "mixer": "self_attn"})


def test_a_module_that_is_never_called_is_an_error_and_not_an_empty_tap(build, input_ids):
    paths = {"blocks": "model.layers", "mixer": "self_attn", "mlp": "mlp.act_fn"}
    model = build("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.Identity()
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(TapError, match="never called in this pass") as caught:
        trace(model, input_ids, taps=["mlp_output"], layers=[1], paths=paths)
    assert "mlp_output of block 1" in str(caught.value)


@pytest.mark.parametrize("model_type", WITHOUT_MLP)
def test_a_tap_that_a_family_lacks_is_refused(model_type, build, input_ids):
    with pytest.raises(TapError, match=f"model of type {model_type} has no tap mlp_output") as caught:
        trace(build(model_type), input_ids, taps=["mlp_output"])
    assert caught.value.allowed == "embedding, hidden, mixer_input, mixer_output, mixing, values, head_input"


def test_an_unknown_tap_suggests_the_right_one(build, input_ids):
    with pytest.raises(UsageError, match=r"Unknown tap. Did you mean 'mixer_output'\?"):
        trace(build("llama"), input_ids, taps=["mixer_outputs"])


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_out_of_range_is_refused(layer, build, input_ids):
    with pytest.raises(UsageError, match=r"A layer is out of range.(?s:.)*allowed: 0 to 2"):
        trace(build("llama"), input_ids, taps=["hidden"], layers=[layer])


@pytest.mark.parametrize(("taps", "layers"), [([], None), (["hidden"], [])])
def test_asking_for_nothing_is_refused(taps, layers, build, input_ids):
    with pytest.raises(UsageError, match="Nothing was asked for"):
        trace(build("llama"), input_ids, taps=taps, layers=layers)


def test_taps_as_one_string_are_refused(build, input_ids):
    with pytest.raises(UsageError, match="must be a sequence of names"):
        trace(build("llama"), input_ids, taps="hidden")


def test_a_trace_says_what_it_holds(build, input_ids):
    found = trace(build("llama"), input_ids, taps=["hidden", "embedding"], layers=[1])
    assert list(found) == ["hidden", "embedding"]
    assert "hidden" in found and "mixer_output" not in found
    assert found.at("hidden", 1) is found["hidden"][1]
    with pytest.raises(UsageError, match=r"not traced.(?s:.)*found:   hidden, embedding"):
        found["mixer_output"]
    with pytest.raises(UsageError, match="asked:   hidden, layer 0"):
        found.at("hidden", 0)


def test_a_base_model_without_a_head_can_be_traced(build, input_ids):
    model = build("llama")
    expected = trace(model, input_ids, taps=["hidden", "head_input"])
    actual = trace(model.model, input_ids, taps=["hidden", "head_input"])
    assert torch.equal(actual["head_input"], expected["head_input"])
    assert torch.equal(actual["hidden"][2], expected["hidden"][2])


def test_an_rwkv_that_halves_its_hidden_state_is_read_only_where_it_trains(build, input_ids):
    model = build("rwkv", rescale_every=2)
    with pytest.raises(TapError, match=r"halves its hidden state(?s:.)*rescale_every: 2(?s:.)*fix: .*rescale_every: 0"):
        trace(model, input_ids, taps=["hidden"])
    model.train()
    expected = trace(build("rwkv"), input_ids, taps=["hidden"])["hidden"]
    found = trace(model, input_ids, taps=["hidden"])["hidden"]
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
    assert list(trace(build("rwkv", rescale_every=3), input_ids, taps=["hidden"])) == ["hidden"]
