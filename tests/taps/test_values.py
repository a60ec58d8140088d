"""The tap `values`: the mixing matrix times it equals the mixer's output, and both are recorded in one pass."""

from __future__ import annotations

import pytest
import torch

from tests.taps.readable import HYBRIDS, READABLE, padded
from xarch_kd.data.batches import Batch
from xarch_kd.errors import TapError, UsageError
from xarch_kd.mixing import SoftmaxMixing
from xarch_kd.taps import mixings
from xarch_kd.taps.layout import layout_of
from xarch_kd.taps.replay import block_calls, read_block, read_mixer, read_mixing, run_mixer
from xarch_kd.taps.sites import Site
from xarch_kd.taps.softmax import AttentionCall
from xarch_kd.taps.trace import trace
from xarch_kd.teacher.feature_cache import DiskCache, MemoryCache
from xarch_kd.teacher.reader import TeacherFeatures

EPSILON = torch.finfo(torch.float32).eps


def spread(values, heads):
    """Return values [batch, time, key heads, dim] repeated per head."""
    return values.repeat_interleave(heads // values.shape[2], dim=2)


@pytest.mark.parametrize("mask", [None, padded], ids=["no-mask", "padded"])
@pytest.mark.parametrize("model_type", READABLE)
@torch.no_grad()
def test_the_matrix_times_the_values_is_what_it_applies(model_type, mask, build, input_ids):
    found = trace(build(model_type), input_ids, mask and mask(input_ids, model_type), taps=["mixing", "values"])
    assert found["values"].keys() == found["mixing"].keys() and found["values"]
    for layer, mixing in found["mixing"].items():
        values = spread(found["values"][layer], mixing.heads)
        assert values.shape[:3] == (mixing.batch, mixing.time, mixing.heads)
        dense = mixing.dense()
        mixed = torch.einsum("bhij,bjhd->bihd", dense, values)
        # Of 13 terms each, whose factors are themselves sums and exponentials in another order.
        bound = 64 * EPSILON * torch.einsum("bhij,bjhd->bihd", dense.abs(), values.abs()).amax()
        assert (mixed - mixing.apply(values)).abs().max() <= bound
        assert mixed.abs().max() > 100 * bound


@pytest.mark.parametrize("mask", [None, padded], ids=["no-mask", "padded"])
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "phi3", "opt", "gpt_oss", "gpt_neox", "olmo2"]
)
@torch.no_grad()
def test_what_attention_mixes_is_what_its_output_projection_is_given(model_type, mask, build, input_ids):
    model = build(model_type, attn_implementation="eager")
    layout = layout_of(model)
    names = {"gpt2": "c_proj", "opt": "out_proj", "gpt_neox": "dense"}
    inner = []
    for mixer in layout.mixers:
        projection = mixer.get_submodule(names.get(model_type, "o_proj"))
        projection.register_forward_pre_hook(lambda _, args: inner.append(args[0]))
    attention_mask = mask and mask(input_ids, model_type)
    found = trace(layout, input_ids, attention_mask, taps=["mixing", "values", "mixer_output"])
    assert len(inner) == len(layout.blocks)
    for layer, expected in enumerate(inner):
        mixing = found["mixing"][layer]
        assert isinstance(mixing, SoftmaxMixing)
        mixed = mixing.apply(spread(found["values"][layer], mixing.heads)).flatten(2)
        largest = mixing.query.norm(dim=-1).max() * mixing.key.norm(dim=-1).max() * abs(mixing.scale)
        # A probability is rounded by its exponent, as in the tests of the matrix itself.
        bound = 2 * EPSILON * (1 + largest) * mixing.time * found["values"][layer].abs().max()
        assert (mixed - expected)[mixing.valid_mask()].abs().max() <= bound


@pytest.mark.parametrize("model_type", ["bamba", "jamba", "qwen3_next", "lfm2"])
@torch.no_grad()
def test_values_alone_are_those_beside_a_mixing(model_type, build, input_ids):
    model = build(model_type)
    both = trace(model, input_ids, taps=["mixing", "values"])["values"]
    alone = trace(model, input_ids, taps=["values"])["values"]
    assert all(torch.equal(alone[layer], both[layer]) for layer in range(len(both)))
    found = trace(model, input_ids, taps={"values": [1], "mixing": [0, 1]})
    assert list(found["values"]) == [1] and list(found["mixing"]) == [0, 1]
    assert torch.equal(found.at("values", 1), both[1])


def test_shapes_by_the_way_a_mixer_holds_its_heads(build, input_ids):
    def first(model_type, **overrides):
        return tuple(trace(build(model_type, **overrides), input_ids, taps=["values"], layers=[0])["values"][0].shape)

    assert first("llama") == (2, 13, 2, 16)
    assert first("bamba") == (2, 13, *_heads(build("bamba").model.layers[0].mamba))
    assert first("jamba") == (2, 13, build("jamba").model.layers[0].mamba.intermediate_size, 1)
    assert first("lfm2") == (2, 13, build("lfm2").config.hidden_size, 1)


def _heads(mixer):
    return mixer.num_heads, mixer.head_dim


@pytest.mark.parametrize(("model_type", "inner"), [("llama", "q_proj"), ("bamba", "in_proj")])
def test_a_mixing_and_its_values_are_read_once(model_type, inner, build, input_ids, monkeypatch):
    model = build(model_type)
    layout = layout_of(model)
    reads, runs = [], []
    make = mixings.mixing_tap
    monkeypatch.setattr("xarch_kd.taps.recording.mixing_tap", lambda *args: reads.append(args[1:]) or make(*args))
    layout.mixers[0].get_submodule(inner).register_forward_hook(lambda *_: runs.append(1))
    calls = block_calls(layout, input_ids)
    fed = torch.randn(2, 13, layout.dim, generator=torch.Generator().manual_seed(1))
    read_block(layout, 0, fed, calls, ["values", "mixing", "mixer_input"])
    read_mixer(layout, 0, fed, calls, ["mixing", "values"])
    assert reads == [(0, ["values", "mixing"]), (0, ["mixing", "values"])]
    assert len(runs) == 2


@pytest.mark.parametrize("mask", [None, padded], ids=["no-mask", "padded"])
@pytest.mark.parametrize("model_type", ["llama", *HYBRIDS])
def test_replay_reads_the_same_values_from_the_inputs_of_a_pass(model_type, mask, build, input_ids):
    layout = layout_of(build(model_type))
    attention_mask = mask and mask(input_ids, model_type)
    with torch.no_grad():
        whole = trace(layout, input_ids, attention_mask, taps=["embedding", "hidden", "mixer_input", "values"])
        calls = block_calls(layout, input_ids, attention_mask)
        entering = whole["embedding"]
        for layer, expected in whole["values"].items():
            fed = whole["mixer_input"][layer]
            assert torch.equal(read_block(layout, layer, entering, calls, ["values"])["values"], expected)
            found = read_mixer(layout, layer, fed, calls, ["values", "mixer_output", "mixing"])
            assert list(found) == ["values", "mixer_output", "mixing"]
            assert torch.equal(found["values"], expected)
            assert torch.equal(found["mixer_output"], run_mixer(layout, layer, fed, calls))
            alone = read_mixing(layout, layer, fed, calls)
            assert all(torch.equal(factor, alone.factors[name]) for name, factor in found["mixing"].factors.items())
            entering = whole["hidden"][layer]


def gradients_of(model, values):
    torch.stack([value.sin().mean() for value in values]).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", *HYBRIDS])
def test_gradients_under_checkpointing_are_bit_equal(model_type, build, input_ids):
    quiet = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if model_type == "gpt2" else {}
    plain, saving = build(model_type, **quiet).train(), build(model_type, **quiet).train()
    saving.activation_checkpointing_enable({"use_reentrant": False})
    expected = gradients_of(plain, trace(plain, input_ids, taps=["values"])["values"].values())
    actual = gradients_of(saving, trace(saving, input_ids, taps=["values"])["values"].values())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
    if model_type == "llama":
        inside = {name.split("self_attn.")[1] for name in expected if "layers.2.self_attn" in name}
        assert inside == {"v_proj.weight"}


@pytest.mark.parametrize("model_type", ["llama", *HYBRIDS])
def test_gradients_of_replayed_values_reach_the_mixer_alone_also_under_checkpointing(model_type, build, input_ids):
    gradients = []
    for saves in (False, True):
        model = build(model_type).train()
        if saves:
            model.activation_checkpointing_enable({"use_reentrant": False})
        layout = layout_of(model)
        fed = torch.randn(2, 13, layout.dim, generator=torch.Generator().manual_seed(1)).requires_grad_()
        read_mixer(layout, 0, fed, block_calls(layout, input_ids), ["values"])["values"].sin().sum().backward()
        own = {id(parameter) for parameter in layout.mixers[0].parameters()}
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert found and all(id(model.get_parameter(name)) in own for name in found)
        gradients.append({**found, "fed": fed.grad})
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def test_values_without_gradients_have_no_graph(build, input_ids):
    with torch.no_grad():
        found = trace(build("bamba"), input_ids, taps=["values"])["values"]
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize(("model_type", "layer", "inner"), [("llama", 1, "o_proj"), ("bamba", 0, "out_proj")])
def test_the_pass_stops_before_the_values_are_mixed(model_type, layer, inner, build, input_ids):
    model = build(model_type)
    layout = layout_of(model)
    ran = []
    for index, block in enumerate(layout.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    getattr(layout.mixers[layer], inner).register_forward_hook(lambda *_: ran.append(inner))
    trace(model, input_ids, taps=["values", "mixer_input"], layers=[layer])
    assert ran == list(range(layer + 1))


@pytest.mark.parametrize(("taps", "kept"), [(["values"], "v"), (["mixing"], "qk"), (["values", "mixing"], "vqk")])
def test_of_an_attention_call_only_what_is_asked_for_is_kept(taps, kept, build, input_ids, monkeypatch):
    reads = []

    def making(*given):
        reads.append(mixings.mixing_tap(*given))
        return reads[-1]

    monkeypatch.setattr("xarch_kd.taps.recording.mixing_tap", making)
    trace(build("llama"), input_ids, taps=taps)
    assert len(reads) == 3
    for read in reads:
        assert (read.value is not None) == ("v" in kept) and (read.call is not None) == ("q" in kept)
        assert read.call is None or read.call.value is None


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", *HYBRIDS])
def test_a_teachers_values_come_back_from_a_cache_bit_for_bit(model_type, kind, build, input_ids, tmp_path):
    layout = layout_of(build(model_type))
    values = [Site("values", layer) for layer in range(len(layout.blocks))]
    cache = MemoryCache() if kind == "memory" else DiskCache(tmp_path)
    reader = TeacherFeatures(layout, [*values, Site("mixing", 0), Site("hidden", 1)], cache)
    batch = Batch(input_ids=input_ids)
    fresh = reader.read(batch)
    runs = []
    layout.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    kept = reader.read(batch)
    assert not runs and list(kept) == list(fresh)
    for site in values:
        expected, found = fresh[site], kept[site]
        assert isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor)
        assert found.dim() == 4 and found.dtype == expected.dtype and torch.equal(found, expected)


def test_a_mixer_without_known_values_is_refused_and_not_listed(build, input_ids):
    model = build("nemotron_h", layers_block_type=["mamba", "mlp", "attention"], num_hidden_layers=3)
    with pytest.raises(TapError, match="values of block 1"):
        trace(model, input_ids, taps=["values"])
    assert list(trace(model, input_ids, taps=["values"], layers=[0, 2])["values"]) == [0, 2]


def test_attention_that_is_never_called_has_no_values(build, input_ids):
    model = build("llama")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(TapError, match=r"LlamaAttention does not call(?s:.)*asked: +values"):
        trace(model, input_ids, taps=["values"])


def test_a_projection_that_is_never_called_has_no_values(build, input_ids):
    model = build("bamba")
    model.model.layers[0].mamba.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(TapError, match=r"projection of BambaMixer was never called(?s:.)*values"):
        trace(model, input_ids, taps=["values"])


def test_values_of_a_cache_are_refused():
    call = AttentionCall(
        module=torch.nn.Identity(),
        query=torch.zeros(1, 2, 5, 4),
        key=torch.zeros(1, 2, 7, 4),
        value=torch.zeros(1, 2, 7, 4),
        mask=None,
        implementation="sdpa",
        arguments={},
    )
    with pytest.raises(TapError, match="a cache or a prefix"):
        call.checked_value()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_values_of_a_compiled_mixer_are_refused(build, input_ids):
    torch.compiler.reset()
    model = build("llama")
    model.model.layers[1].self_attn = torch.compile(model.model.layers[1].self_attn, backend="eager")
    with pytest.raises(TapError, match="values of a compiled mixer"):
        trace(model, input_ids, taps=["values"], layers=[1])


def test_a_mixer_alone_has_no_other_taps(build, input_ids):
    layout = layout_of(build("llama"))
    calls = block_calls(layout, input_ids)
    for taps in (["values", "hidden"], []):
        with pytest.raises(UsageError, match="A mixer alone has no such tap"):
            read_mixer(layout, 0, torch.zeros(2, 13, 64), calls, taps)
