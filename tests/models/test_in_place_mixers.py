"""Initial weights of mixers in a teacher's own blocks, and taps of such students."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional

from xarch_kd.errors import TapError
from xarch_kd.mixing.softmax import SoftmaxMixing
from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.conversion.weights import LinearWeights
from xarch_kd.models.in_place.attention import attention_of, attention_sizes
from xarch_kd.models.in_place.teachers import IN_PLACE_TEACHERS
from xarch_kd.taps.families import FAMILIES as TAPPED
from xarch_kd.taps.families import family_of
from xarch_kd.taps.inspect import inspect_model
from xarch_kd.taps.layout import layout_of, trainable_names
from xarch_kd.taps.replay import block_calls, read_block
from xarch_kd.taps.trace import trace
from xarch_kd.testing.tiny import VOCABULARY, tiny_model

MIXERS = ("mamba2", "gated_delta")
# Two classes that hold the same student: in place, and stock.
TWICE = {"mamba2": "mistral", "gated_delta": "qwen3"}


def tokens(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def applied(projection: LinearWeights, inputs: Tensor) -> Tensor:
    return functional.linear(inputs, projection.weight, projection.bias)


def unusual(model_type: str) -> dict[str, Any]:
    """Overrides that make a family differ from what is usual where the weights are read."""
    return {
        "gemma2": {"query_pre_attn_scalar": 20, "attention_bias": True},
        "gpt2": {"scale_attn_by_inverse_layer_idx": True},
        "mistral": {"sliding_window": 8},
    }.get(model_type, {})


@pytest.mark.parametrize("model_type", IN_PLACE_TEACHERS)
@torch.no_grad()
def test_the_weights_of_an_attention_are_what_it_computes_with(model_type: str) -> None:
    teacher = tiny_model(model_type, **unusual(model_type))
    attention, sizes = attention_of(teacher, 1), attention_sizes(teacher.config)
    # At the first position rotation is the identity, and the only value is the average.
    layout = layout_of(teacher)
    returned: list[Tensor] = []
    layout.mixers[1].register_forward_hook(lambda _, given, made: returned.append(made[0]))
    found = trace(teacher, tokens(8, 1), taps=["mixer_input", "mixing"], layers=[1])
    teacher(tokens(8, 1))
    inputs, mixing = found["mixer_input"][1], found["mixing"][1]
    assert isinstance(mixing, SoftmaxMixing)
    value = in_heads(applied(attention.value, inputs), sizes.head_dim, sizes.heads)
    expected = applied(attention.output, rearrange(value, "b t h d -> b t (h d)"))
    torch.testing.assert_close(returned[-1], expected, rtol=1e-5, atol=1e-5)
    if "q_norm" not in dict(layout.mixers[1].named_children()):
        query = in_heads(applied(attention.query, inputs), sizes.head_dim, sizes.heads)
        torch.testing.assert_close(mixing.query * mixing.scale, query * sizes.head_dim**-0.5, rtol=1e-5, atol=1e-5)
        key = in_heads(applied(attention.key, inputs), sizes.head_dim, mixing.key.shape[2])
        torch.testing.assert_close(mixing.key, key, rtol=1e-5, atol=1e-5)


def in_heads(projected: Tensor, head_dim: int, heads: int) -> Tensor:
    """[batch, time, heads, head_dim], each given head repeated as often as it is shared."""
    apart = rearrange(projected, "b t (g d) -> b t g d", d=head_dim)
    return repeat(apart, "b t g d -> b t (g n) d", n=heads // apart.shape[2])


@pytest.mark.parametrize(("model_type", "offset"), [("gemma3_text", 1.0), ("qwen3", 0.0)])
@torch.no_grad()
def test_norms_of_queries_and_keys_are_folded_at_the_size_they_give_white_input(model_type: str, offset: float) -> None:
    # With this scale, and no other, queries are divided by the root of their number.
    teacher = tiny_model(model_type, **({"query_pre_attn_scalar": 16} if model_type == "gemma3_text" else {}))
    attention, block = attention_of(teacher, 1), teacher.model.layers[1]
    white = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0))
    inputs = white * (block.input_layernorm.weight + offset)
    for projection, inner, name in (
        (attention.query, block.self_attn.q_proj, "q_norm"),
        (attention.key, block.self_attn.k_proj, "k_norm"),
    ):
        weight = getattr(block.self_attn, name).weight + offset
        found = rearrange(applied(projection, inputs), "t (h d) -> t h d", d=16) / weight
        # Without the norm's weight a head's mean square is 1, to the error of 20,000 draws.
        assert float((found.square().mean(dim=(0, 2)) - 1.0).abs().max()) < 0.05
        # And each row points where it did.
        ratio = projection.weight / inner.weight
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_a_student_that_a_stock_class_holds_too_is_the_same_in_both(mixer: str) -> None:
    teacher = tiny_model(TWICE[mixer])
    stock = convert(teacher, replace=[1], mixer=mixer)
    student = convert(teacher, replace=[1], mixer=mixer, target="in_place")
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :6] = 0
    expected, found = (model(tokens(), attention_mask=mask).logits[mask.bool()] for model in (stock, student))
    # The same sums; weights are folded in another order where queries and keys are normed.
    assert float((found - expected).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    mixings = [trace(model, tokens(), mask, taps=["mixing"], layers=[1])["mixing"][1] for model in (stock, student)]
    torch.testing.assert_close(mixings[1].dense(), mixings[0].dense(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_a_mixer_from_attention_is_nearer_to_it_than_a_random_one(mixer: str) -> None:
    for model_type in IN_PLACE_TEACHERS:
        teacher = tiny_model(model_type, **unusual(model_type))
        expected = trace(teacher, tokens(), taps=["mixer_output"], layers=[1])["mixer_output"][1]
        errors = []
        for start in ("attention", "random"):
            student = convert(teacher, replace=[1], mixer=mixer, init=start, seed=3, check=False, target="in_place")
            found = trace(student, tokens(), taps=["mixer_output"], layers=[1])["mixer_output"][1]
            errors.append(float(functional.cosine_similarity(found, expected, dim=-1).mean()))
        assert errors[0] > errors[1] + 0.1, model_type


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("model_type", IN_PLACE_TEACHERS)
def test_the_parts_are_found_by_the_teachers_row_and_the_mixers_kind(model_type: str, mixer: str) -> None:
    teacher = tiny_model(model_type, **unusual(model_type))
    student = convert(teacher, replace=[1], mixer=mixer, check=False, target="in_place")
    layout, expected = layout_of(student), layout_of(teacher)
    assert layout.mixer_kinds == ("attention", mixer, *["attention"] * (len(layout.blocks) - 2))
    assert [layout.path_of(part) for part in layout.mixers] == [expected.path_of(part) for part in expected.mixers]
    assert layout.path_of(layout.mixer_outputs[1]) == expected.path_of(expected.mixer_outputs[1])
    trained = trainable_names(student, layout, ["mixers"], [1])
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in trained} >= {"conv1d", "out_proj"}
    kinds = {row.kind: row.layers for row in inspect_model(student.config) if row.tap == "mixing"}
    assert kinds[mixer] == (1,)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("model_type", ["gemma2", "mistral", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_a_block_run_alone_gives_what_it_gives_in_the_model(model_type: str, mixer: str) -> None:
    student = convert(
        tiny_model(model_type, **unusual(model_type)), replace=[1], mixer=mixer, check=False, target="in_place"
    )
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :6] = 0
    whole = trace(student, tokens(), mask, taps=["hidden", "mixer_output", "mixing"])
    calls = block_calls(student, tokens(), mask)
    alone = read_block(layout_of(student), 1, whole["hidden"][0], calls, taps=["hidden", "mixer_output", "mixing"])
    assert torch.equal(alone["hidden"], whole["hidden"][1])
    assert torch.equal(alone["mixer_output"], whole["mixer_output"][1])
    assert torch.equal(alone["mixing"].dense(), whole["mixing"][1].dense())
    # The padded row begins where its text does.
    assert not alone["mixing"].dense()[0, :, :, :6].any()


def test_the_taps_know_every_family_that_is_converted_in_place() -> None:
    assert IN_PLACE_TEACHERS.keys() <= TAPPED.keys()
    assert family_of("xarch_kd_gemma2").mixer_output == "post_attention_layernorm"
    with pytest.raises(TapError, match="not known"):
        family_of("xarch_kd_nothing")
