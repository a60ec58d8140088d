"""The tap `mixing`: modules that run, side effects and memory, in `trace` and in replay."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.taps.readable import HYBRIDS, READABLE, padded
from xarch_kd.errors import TapError, UsageError
from xarch_kd.mixing.base import Mixing
from xarch_kd.taps.layout import layout_of
from xarch_kd.taps.replay import block_calls, read_block, read_mixing, run_mixer
from xarch_kd.taps.trace import trace


def same(first, second):
    factors = first.factors
    return type(first) is type(second) and all(torch.equal(factors[n], second.factors[n]) for n in factors)


def implementations(model):
    """The name of the attention function in every config of the model, and all that the table of functions has."""
    configs = {name: id(module.config) for name, module in model.named_modules() if hasattr(module, "config")}
    return configs, model.config._attn_implementation, dict(ALL_ATTENTION_FUNCTIONS)


READ = [(family, "eager") for family in ("llama", "mistral", "gemma2", "gpt_oss", "gpt2", *HYBRIDS)]
# gemma2 and gpt_oss have no sdpa.
READ += [(family, "sdpa") for family in ("llama", "mistral", "gpt2", *HYBRIDS)]


@pytest.mark.parametrize(("model_type", "implementation"), READ)
def test_reading_leaves_the_pass_and_the_model_as_they_are(model_type, implementation, build, input_ids, count_hooks):
    model = build(model_type, attn_implementation=implementation)
    mask = padded(input_ids, model_type)
    before = implementations(model)
    with torch.no_grad():
        for attention_mask in (None, mask):
            expected = trace(model, input_ids, attention_mask, taps=["hidden", "mixer_output", "head_input"])
            found = trace(model, input_ids, attention_mask, taps=["mixing", "hidden", "mixer_output", "head_input"])
            assert torch.equal(found["head_input"], expected["head_input"])
            for layer, hidden in expected["hidden"].items():
                assert torch.equal(found["hidden"][layer], hidden)
                assert torch.equal(found["mixer_output"][layer], expected["mixer_output"][layer])
    assert all(isinstance(mixing, Mixing) for mixing in found["mixing"].values())
    assert implementations(model) == before and count_hooks(model) == 0


def test_the_model_is_as_it_was_after_an_exception(build, input_ids, count_hooks, monkeypatch):
    model = build("llama")
    before = implementations(model)

    def broken(*_):
        raise ZeroDivisionError("in the middle of a block")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", broken)
    with pytest.raises(ZeroDivisionError):
        trace(model, input_ids, taps=["mixing"])
    assert implementations(model) == before and count_hooks(model) == 0


def test_no_mask_of_tokens_by_tokens_is_made_for_a_batch_without_padding(build, input_ids):
    model = build("llama")
    masks = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    trace(model, input_ids, torch.ones_like(input_ids), taps=["mixing"])
    assert masks == [None]


def values_of(mixing):
    """Any values that the mixing can be applied to, the same for the same sizes."""
    sizes = (mixing.batch, mixing.time, mixing.heads, 3)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(2))


def gradients_of(model, mixings):
    torch.stack([mixing.apply(values_of(mixing)).sin().mean() for mixing in mixings]).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", *HYBRIDS])
def test_gradients_under_checkpointing_are_bit_equal_and_reach_what_the_matrix_is_made_of(model_type, build, input_ids):
    quiet = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if model_type == "gpt2" else {}
    plain, saving = build(model_type, **quiet).train(), build(model_type, **quiet).train()
    saving.activation_checkpointing_enable({"use_reentrant": False})
    runs = []
    layout_of(saving).mixers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    mask = torch.ones_like(input_ids)
    expected = gradients_of(plain, trace(plain, input_ids, mask, taps=["mixing"])["mixing"].values())
    found = trace(saving, input_ids, mask, taps=["mixing"])["mixing"]
    actual = gradients_of(saving, found.values())
    assert len(runs) == 2
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name
    if model_type == "llama":
        inside = {name.split("self_attn.")[1] for name in expected if "layers.2.self_attn" in name}
        assert inside == {"q_proj.weight", "k_proj.weight"}


def test_a_mixing_without_gradients_has_no_graph(build, input_ids):
    with torch.no_grad():
        found = trace(build("bamba"), input_ids, taps=["mixing"])["mixing"]
    assert not any(factor.requires_grad for mixing in found.values() for factor in mixing.factors.values())


def test_reentrant_checkpointing_is_refused(build, input_ids):
    model = build("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(TapError, match="silently lose their gradients"):
        trace(model, input_ids, taps=["mixing"])


@pytest.mark.parametrize(("model_type", "layer", "inner"), [("llama", 1, "o_proj"), ("bamba", 0, "out_proj")])
def test_the_pass_stops_before_the_mixing_itself_is_computed(model_type, layer, inner, build, input_ids):
    model = build(model_type)
    layout = layout_of(model)
    ran = []
    for index, block in enumerate(layout.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    getattr(layout.mixers[layer], inner).register_forward_hook(lambda *_: ran.append(inner))
    trace(model, input_ids, taps=["mixing", "mixer_input"], layers=[layer])
    assert ran == list(range(layer + 1))
    trace(model, input_ids, taps=["mixing", "mixer_output"], layers=[layer])
    assert ran[-1] == inner


def test_a_checkpointed_block_runs_to_its_end(build, input_ids):
    model = build("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    ran = []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    trace(model, input_ids, taps=["mixing"], layers=[1])
    assert ran == [0, 1]


def test_nothing_but_the_factors_is_kept_alive(build, input_ids):
    model = build("llama")
    seen = []
    for block in model.model.layers:
        for module in (block.input_layernorm, block.self_attn.v_proj, block.self_attn.o_proj, block.mlp):
            module.register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            found = trace(model, input_ids, taps=["mixing"])
        assert len(seen) > 8 and not any(reference() is not None for reference in seen)
    finally:
        gc.enable()
    assert len(found["mixing"]) == 3


def test_two_models_are_read_in_turns_and_one_inside_the_other(build, input_ids):
    outer, inner = build("llama"), build("qwen3")
    alone = [trace(model, input_ids, taps=["mixing"])["mixing"] for model in (outer, inner)]
    within = []

    def read(*_):
        if not within:
            within.append(None)
            within.append(trace(inner, input_ids, taps=["mixing"])["mixing"])

    outer.model.layers[1].mlp.register_forward_hook(read)
    found = trace(outer, input_ids, taps=["mixing"])["mixing"]
    assert all(same(found[layer], alone[0][layer]) for layer in range(3))
    assert all(same(within[1][layer], alone[1][layer]) for layer in range(3))


def test_blocks_that_share_one_mixer_are_told_apart(build, input_ids):
    model = build("llama")
    shared = model.model.layers[0].self_attn
    model.model.layers[2].self_attn = shared
    before = implementations(model)
    found = trace(model, input_ids, taps=["mixing", "mixer_input"])
    projected = [shared.q_proj(found["mixer_input"][0]), shared.q_proj(found["mixer_input"][2])]
    assert not same(found["mixing"][0], found["mixing"][2])
    for layer, query in zip((0, 2), projected, strict=True):
        # Rotation keeps the length of each query.
        expected = query.view(2, 13, 4, 16).norm(dim=-1)
        assert torch.allclose(found["mixing"][layer].factors["query"].norm(dim=-1), expected, rtol=1e-5)
    only = trace(model, input_ids, taps=["mixing"], layers=[2])["mixing"]
    assert same(only[2], found["mixing"][2])
    assert implementations(model) == before


def test_blocks_that_share_one_recurrent_mixer_are_told_apart(build, input_ids):
    model = build("bamba")
    model.model.layers[2].mamba = model.model.layers[0].mamba
    found = trace(model, input_ids, taps=["mixing", "mixer_input"], layers=[0, 2])
    calls = block_calls(model, input_ids)
    for layer in (0, 2):
        alone = read_mixing(layout_of(model), layer, found["mixer_input"][layer], calls)
        assert same(found["mixing"][layer], alone)
    assert not same(found["mixing"][0], found["mixing"][2])
    assert same(trace(model, input_ids, taps=["mixing"], layers=[2])["mixing"][2], found["mixing"][2])


@pytest.mark.parametrize("mask", [None, padded], ids=["no-mask", "padded"])
@pytest.mark.parametrize("model_type", READABLE)
def test_replay_reads_the_same_mixing_from_the_inputs_of_a_pass(model_type, mask, build, input_ids):
    model = build(model_type)
    attention_mask = mask and mask(input_ids, model_type)
    layout = layout_of(model)
    with torch.no_grad():
        whole = trace(layout, input_ids, attention_mask, taps=["embedding", "hidden", "mixer_input", "mixing"])
        calls = block_calls(layout, input_ids, attention_mask)
        entering = whole["embedding"]
        for layer, expected in whole["mixing"].items():
            inside = read_block(layout, layer, entering, calls, ["mixing", "hidden"])
            alone = read_mixing(layout, layer, whole["mixer_input"][layer], calls)
            assert same(inside["mixing"], expected) and same(alone, expected)
            assert torch.equal(inside["mixing"].valid_mask(), expected.valid_mask())
            entering = whole["hidden"][layer]
            assert torch.equal(inside["hidden"], entering)


@pytest.mark.parametrize("model_type", ["llama", *HYBRIDS])
def test_a_replayed_mixing_is_read_without_running_what_comes_after_its_factors(model_type, build, input_ids):
    model = build(model_type)
    layout = layout_of(model)
    calls = block_calls(layout, input_ids)
    fed = torch.randn(2, 13, layout.dim, generator=torch.Generator().manual_seed(1))
    for layer, mixer in enumerate(layout.mixers):
        ends = []
        handle = mixer.register_forward_hook(lambda *_, ends=ends: ends.append(1))
        read_mixing(layout, layer, fed, calls)
        read_block(layout, layer, fed, calls, ["mixing"])
        assert not ends
        run_mixer(layout, layer, fed, calls)
        assert ends
        handle.remove()


@pytest.mark.parametrize("model_type", ["llama", *HYBRIDS])
def test_gradients_of_what_is_replayed_stay_in_its_mixer_also_under_checkpointing(model_type, build, input_ids):
    gradients = []
    for saves in (False, True):
        model = build(model_type).train()
        if saves:
            model.activation_checkpointing_enable({"use_reentrant": False})
        layout = layout_of(model)
        calls = block_calls(layout, input_ids)
        fed = torch.randn(2, 13, layout.dim, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for layer in range(2):
            mixing = read_mixing(layout, layer, fed, calls)
            output = run_mixer(layout, layer, fed, calls)
            (mixing.apply(values_of(mixing)).sin().sum() + output.sin().sum()).backward()
        # What a mixer adds may be normed after it.
        own = {id(p) for layer in range(2) for p in layout.mixers[layer].parameters()}
        own |= {id(p) for layer in range(2) for p in layout.mixer_outputs[layer].parameters()}
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert found and all(id(model.get_parameter(name)) in own for name in found)
        assert all(getattr(block, "gradient_checkpointing", False) is saves for block in layout.blocks)
        gradients.append({**found, "fed": fed.grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradients[1][name], gradient), name


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_parts_are_refused_where_they_hide_a_mixing(build, input_ids):
    model = build("llama")
    expected = trace(model, input_ids, taps=["mixing"], layers=[2])["mixing"][2]
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.model.layers[1].self_attn = torch.compile(model.model.layers[1].self_attn, backend="eager")
    with pytest.raises(TapError, match="inside a compiled block"):
        trace(model, input_ids, taps=["mixing"], layers=[0])
    with pytest.raises(TapError, match="mixing of a compiled mixer"):
        trace(model, input_ids, taps=["mixing"], layers=[1])
    found = trace(model, input_ids, taps=["mixing"], layers=[2])["mixing"][2]
    assert torch.allclose(found.factors["query"], expected.factors["query"], atol=1e-5)


def test_a_mixer_without_a_known_matrix_is_refused_and_not_listed(build, input_ids):
    model = build("nemotron_h", layers_block_type=["mamba", "mlp", "attention"], num_hidden_layers=3)
    layout = layout_of(model)
    assert layout.mixer_kinds == ("mamba2", "other", "attention")
    with pytest.raises(TapError, match="mixing matrix of NemotronHMLP cannot be built") as caught:
        trace(model, input_ids, taps=["mixing"])
    assert "mixing of block 1" in str(caught.value) and "BambaMixer" in str(caught.value)
    assert list(trace(model, input_ids, taps=["mixing"], layers=[0, 2])["mixing"]) == [0, 2]


def test_attention_that_is_never_called_is_an_error(build, input_ids):
    model = build("llama")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(TapError, match="LlamaAttention does not call transformers' AttentionInterface"):
        trace(model, input_ids, taps=["mixing"])


def test_a_projection_that_is_never_called_is_an_error(build, input_ids):
    model = build("bamba")
    model.model.layers[0].mamba.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(TapError, match=r"projection of BambaMixer was never called(?s:.)*in_proj"):
        trace(model, input_ids, taps=["mixing"])


def test_a_trace_gives_a_mixing_by_its_site(build, input_ids):
    found = trace(build("llama"), input_ids, taps=["mixing"], layers=[1])
    assert found.at("mixing", 1) is found["mixing"][1] and list(found) == ["mixing"]
    with pytest.raises(UsageError, match="not traced"):
        found.at("mixing", 0)


def test_a_subclass_of_a_known_mixer_is_read_like_its_parent(build, input_ids):
    model = build("bamba")
    expected = trace(model, input_ids, taps=["mixing"], layers=[0])["mixing"][0]
    mixer = model.model.layers[0].mamba
    mixer.__class__ = type("OwnMixer", (type(mixer),), {})
    assert same(trace(model, input_ids, taps=["mixing"], layers=[0])["mixing"][0], expected)
