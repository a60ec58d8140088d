from __future__ import annotations

import gc
import weakref

import pytest
import torch

from xarch_kd.errors import TapError, UsageError
from xarch_kd.taps.families import FAMILIES
from xarch_kd.taps.layout import layout_of
from xarch_kd.taps.replay import block_calls, read_block, run_block, run_mixer
from xarch_kd.taps.trace import trace

STARCODER2 = {"blocks": "model.layers", "mixer": "self_attn", "mlp": "mlp"}
RECURRENT = ("mamba", "mamba2")


def right_padded(input_ids):
    mask = torch.ones_like(input_ids)
    mask[1, -4:] = 0
    return mask


def left_padded(input_ids):
    return right_padded(input_ids).flip(1)


MASKS = pytest.mark.parametrize("mask", [None, right_padded, left_padded], ids=["no-mask", "right", "left"])


@MASKS
@pytest.mark.parametrize("model_type", FAMILIES)
def test_replaying_a_model_s_own_inputs_gives_its_full_pass_bit_for_bit(model_type, mask, build, input_ids):
    model = build(model_type)
    attention_mask = mask and mask(input_ids)
    taps = ["hidden", "mixer_input", "mixer_output"]
    with torch.no_grad():
        whole = trace(model, input_ids, attention_mask, taps=["embedding", *taps])
        layout = layout_of(model)
        calls = block_calls(layout, input_ids, attention_mask)
        hidden = whole["embedding"]
        for layer in range(len(layout.blocks)):
            assert torch.equal(
                run_mixer(layout, layer, whole["mixer_input"][layer], calls), whole["mixer_output"][layer]
            )
            inside = read_block(layout, layer, hidden, calls, taps)
            for tap in taps:
                assert torch.equal(inside[tap], whole[tap][layer])
            hidden = run_block(layout, layer, hidden, calls)
            assert torch.equal(hidden, whole["hidden"][layer])


def test_replay_of_a_family_given_by_paths_equals_its_full_pass(build, input_ids):
    model = build("starcoder2")
    mask = left_padded(input_ids)
    with torch.no_grad():
        whole = trace(
            model, input_ids, mask, taps=["embedding", "hidden", "mixer_input", "mixer_output"], paths=STARCODER2
        )
        layout = layout_of(model, STARCODER2)
        calls = block_calls(model, input_ids, mask, paths=STARCODER2)
        assert torch.equal(run_block(layout, 0, whole["embedding"], calls), whole["hidden"][0])
        assert torch.equal(run_mixer(layout, 2, whole["mixer_input"][2], calls), whole["mixer_output"][2])


def test_replay_of_bamba_given_by_paths_finds_out_that_its_blocks_return_tuples(build, input_ids):
    model = build("bamba")
    paths = {"blocks": "model.layers", "mixer": "self_attn|mamba", "mlp": "feed_forward"}
    layout = layout_of(model, paths)
    assert layout.mixer_kinds == ("mamba2", "attention", "mamba2")
    with torch.no_grad():
        whole = trace(model, input_ids, taps=["embedding", "hidden"])
        calls = block_calls(layout, input_ids)
        assert torch.equal(run_block(layout, 1, whole["hidden"][0], calls), whole["hidden"][1])


def test_the_mask_that_was_recorded_matters(build, input_ids):
    model = build("llama")
    layout = layout_of(model)
    with torch.no_grad():
        inputs = trace(model, input_ids, taps=["mixer_input"], layers=[0])["mixer_input"][0]
        masked = run_mixer(layout, 0, inputs, block_calls(model, input_ids, left_padded(input_ids)))
        plain = run_mixer(layout, 0, inputs, block_calls(model, input_ids))
    assert torch.equal(masked[0], plain[0])
    assert not torch.allclose(masked[1, 6:], plain[1, 6:], atol=1e-2)


@pytest.mark.parametrize("model_type", ["llama", "granite", "bamba", "mamba", "mamba2"])
def test_gradients_of_a_replayed_mixer_reach_every_parameter_of_that_mixer_and_no_other(model_type, build, input_ids):
    model = build(model_type)
    layout = layout_of(model)
    calls = block_calls(layout, input_ids)
    inputs = torch.randn(2, 13, 64, generator=torch.Generator().manual_seed(1))
    run_mixer(layout, 0, inputs, calls).pow(2).sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == set(layout.mixer_parameter_names(0))


@pytest.mark.parametrize("model_type", ["llama", "bamba", "mamba2"])
def test_gradients_of_a_replayed_mixer_equal_those_of_the_full_pass(model_type, build, input_ids):
    whole, alone = build(model_type), build(model_type)
    found = trace(whole, input_ids, taps=["mixer_input", "mixer_output"], layers=[1])
    found["mixer_output"][1].sin().sum().backward()
    layout = layout_of(alone)
    output = run_mixer(layout, 1, found["mixer_input"][1].detach(), block_calls(alone, input_ids))
    output.sin().sum().backward()
    expected = dict(whole.named_parameters())
    for name in layout.mixer_parameter_names(1):
        assert torch.equal(alone.get_parameter(name).grad, expected[name].grad), name


def test_gradients_reach_the_mixer_s_input(build, input_ids):
    model = build("bamba")
    inputs = torch.randn(2, 13, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    run_mixer(layout_of(model), 0, inputs, block_calls(model, input_ids)).sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0


@pytest.mark.parametrize("model_type", ["llama", "bamba", "mamba", "mamba2", "gemma2"])
@pytest.mark.parametrize("what", ["mixer", "block"])
def test_replay_under_checkpointing_has_bit_equal_gradients_and_does_recompute(what, model_type, build, input_ids):
    inputs = torch.randn(2, 13, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for saves in (False, True):
        model = build(model_type).train()
        if saves:
            model.activation_checkpointing_enable({"use_reentrant": False})
        layout = layout_of(model)
        calls = block_calls(model, input_ids)
        mixer_runs = []
        layout.mixers[0].register_forward_pre_hook(lambda *_, runs=mixer_runs: runs.append(1))
        if what == "mixer":
            output = run_mixer(layout, 0, inputs, calls)
        else:
            output = read_block(layout, 0, inputs, calls, ["mixer_output"])["mixer_output"]
        output.sin().sum().backward()
        assert len(mixer_runs) == 1 + saves
        assert all(getattr(block, "gradient_checkpointing", False) is saves for block in layout.blocks)
        gradients.append({name: model.get_parameter(name).grad for name in layout.mixer_parameter_names(0)})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_reentrant_checkpointing_is_refused(build, input_ids):
    model = build("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    layout = layout_of(model)
    calls = block_calls(model, input_ids)
    hidden = torch.zeros(2, 13, 64)
    with pytest.raises(TapError, match="silently lose their gradients"):
        run_mixer(layout, 0, hidden, calls)
    with pytest.raises(TapError, match="silently lose their gradients"):
        read_block(layout, 0, hidden, calls)


def test_no_block_runs_and_no_gradient_is_kept_while_calls_are_recorded(build, input_ids):
    model = build("llama")

    def never(*_, **__):
        raise AssertionError("a block ran")

    for block in model.model.layers:
        block.forward = never
    with_gradients = []
    model.model.norm.register_forward_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    calls = block_calls(model, input_ids)
    assert len(calls) == 3
    assert with_gradients == [False] and torch.is_grad_enabled()
    assert set(calls[0].kwargs) >= {"attention_mask", "position_ids", "position_embeddings"}
    assert not any(tensor.requires_grad for tensor in calls[0].kwargs["position_embeddings"])


def test_bamba_s_blocks_get_the_mask_of_their_own_kind(build, input_ids):
    mask = left_padded(input_ids)
    calls = block_calls(build("bamba"), input_ids, mask)
    assert calls[0].kwargs["attention_mask"].shape == (2, 13)
    assert calls[1].kwargs["attention_mask"].shape == (2, 1, 13, 13)


@pytest.mark.parametrize("paths", [None, STARCODER2], ids=["table", "paths"])
def test_blocks_are_put_back_after_recording(paths, build, input_ids):
    model = build("llama" if paths is None else "starcoder2")
    before, names = list(model.model.layers), list(model.state_dict())
    block_calls(model, input_ids, paths=paths)
    assert all(now is then for now, then in zip(model.model.layers, before, strict=True))
    assert list(model.state_dict()) == names


def test_blocks_are_put_back_after_an_exception(build, input_ids, monkeypatch):
    model = build("llama")
    before = list(model.model.layers)

    def broken(*_):
        raise ZeroDivisionError("after the stand-ins were called")

    monkeypatch.setattr(model.model.norm, "forward", broken)
    with pytest.raises(ZeroDivisionError):
        block_calls(model, input_ids)
    assert all(now is then for now, then in zip(model.model.layers, before, strict=True))


def test_hooks_are_removed_after_replay_and_after_its_exceptions(build, input_ids, count_hooks, monkeypatch):
    model = build("bamba")
    layout = layout_of(model)
    calls = block_calls(model, input_ids)
    hidden = torch.zeros(2, 13, 64)
    read_block(layout, 0, hidden, calls, ["hidden", "mixer_output", "mlp_output"])
    run_mixer(layout, 0, hidden, calls)
    assert count_hooks(model) == 0

    def broken(*_, **__):
        raise ZeroDivisionError("inside the mixer")

    monkeypatch.setattr(model.model.layers[0].mamba, "forward", broken)
    for replay in (run_mixer, run_block):
        with pytest.raises(ZeroDivisionError):
            replay(layout, 0, hidden, calls)
    assert count_hooks(model) == 0


def test_the_mlp_does_not_run_when_only_the_mixer_is_read(build, input_ids, monkeypatch):
    model = build("bamba")
    layout = layout_of(model)
    calls = block_calls(model, input_ids)

    def never(*_):
        raise AssertionError("the MLP ran")

    monkeypatch.setattr(model.model.layers[0].feed_forward, "forward", never)
    hidden = torch.zeros(2, 13, 64)
    run_mixer(layout, 0, hidden, calls)
    read_block(layout, 0, hidden, calls, ["mixer_input", "mixer_output"])
    with pytest.raises(AssertionError, match="the MLP ran"):
        read_block(layout, 0, hidden, calls)


def test_a_checkpointed_block_runs_to_its_end_even_when_only_the_mixer_is_read(build, input_ids):
    model = build("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    ran = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append("mlp"))
    read_block(layout_of(model), 0, torch.zeros(2, 13, 64), block_calls(model, input_ids), ["mixer_output"])
    assert ran == ["mlp"]


def test_a_replayed_mixer_keeps_nothing_but_its_output_alive(build, input_ids):
    model = build("bamba")
    layout = layout_of(model)
    seen = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output)))
    calls = block_calls(model, input_ids)
    gc.collect()
    gc.disable()
    try:
        output = run_mixer(layout, 0, torch.zeros(2, 13, 64), calls)
        assert len(seen) == 1 and seen[0]() is None
    finally:
        gc.enable()
    assert output.requires_grad


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_replay_as_blocks_and_refuse_their_insides(build, input_ids):
    model = build("llama")
    with torch.no_grad():
        whole = trace(model, input_ids, taps=["embedding", "hidden"])
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="aot_eager")
        layout = layout_of(model)
        calls = block_calls(model, input_ids)
        assert torch.allclose(run_block(layout, 0, whole["embedding"], calls), whole["hidden"][0], atol=1e-5)
        with pytest.raises(TapError, match="inside a compiled block"):
            run_mixer(layout, 0, whole["embedding"], calls)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_out_of_range_is_refused(layer, build, input_ids):
    layout = layout_of(build("llama"))
    calls = block_calls(layout, input_ids)
    for replay in (run_block, run_mixer):
        with pytest.raises(UsageError, match="out of range"):
            replay(layout, layer, torch.zeros(2, 13, 64), calls)


def test_taps_of_the_whole_model_are_no_taps_of_a_block(build, input_ids):
    layout = layout_of(build("llama"))
    with pytest.raises(UsageError, match="A block has no such tap"):
        read_block(layout, 0, torch.zeros(2, 13, 64), block_calls(layout, input_ids), ["head_input"])


@pytest.mark.parametrize("model_type", RECURRENT)
def test_a_block_without_an_mlp_refuses_its_output(model_type, build, input_ids):
    layout = layout_of(build(model_type))
    with pytest.raises(TapError, match="has no tap mlp_output: its family's table names no MLP"):
        read_block(layout, 0, torch.zeros(2, 13, 64), block_calls(layout, input_ids), ["mlp_output"])
