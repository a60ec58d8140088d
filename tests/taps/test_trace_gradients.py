"""Taps under autograd, gradient checkpointing and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.taps.hands import ROUNDINGS, close, count_calls, taps_of
from xarch_kd.errors import TapError
from xarch_kd.taps.layout import layout_of
from xarch_kd.taps.trace import trace


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


# Making the graph of a backward pass is the slow part, most of all for the recurrence of Bamba: once is enough.
@compiling
@pytest.mark.parametrize(
    ("model_type", "in_place", "backend"),
    [("llama", False, "aot_eager"), ("llama", True, "eager"), ("bamba", False, "eager")],
)
def test_taps_outside_compiled_blocks_and_their_gradients_equal_the_eager_ones(
    model_type, in_place, backend, build, input_ids
):
    eager, compiled = build(model_type), build(model_type)
    block = compiled.model.layers[1]
    if in_place:
        block.compile(backend=backend)
    else:
        compiled.model.layers[1] = torch.compile(block, backend=backend)
    # A pass before any hook exists: what is compiled then must not make later traces blind.
    compiled(input_ids)
    trace(compiled, input_ids, taps=["hidden"], layers=[1])
    taps = ["embedding", "hidden"]
    expected, actual = (trace(model, input_ids, taps=taps, layers=[0, 1]) for model in (eager, compiled))
    assert torch.equal(actual["embedding"], expected["embedding"])
    for layer in (0, 1):
        assert close(actual["hidden"][layer], expected["hidden"][layer])
    for found in (expected, actual):
        found["hidden"][1].sin().mean().backward()
    name = "feed_forward" if model_type == "bamba" else "mlp"
    first, second = (getattr(layout_of(model).blocks[1], name).up_proj.weight.grad for model in (eager, compiled))
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
    block = compiled.model.layers[1]
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
