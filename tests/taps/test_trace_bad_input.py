"""Families outside the table, missing taps, and wrong arguments."""

from __future__ import annotations

import pytest
import torch

from tests.taps.hands import WITHOUT_MLP, close, taps_of
from xarch_kd.errors import TapError, UsageError
from xarch_kd.taps.trace import trace

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


def test_a_model_without_blocks_is_refused(build, input_ids):
    model = build("llama")
    del model.model.layers[:]
    with pytest.raises(TapError, match="The model has no blocks"):
        trace(model, input_ids, taps=["hidden"])


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
    with pytest.raises(UsageError, match="No site was requested"):
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
