from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from xarch_kd.models.conversion.activation_stats import ROWS, TOKENS, activation_stats
from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.conversion.delta_mixers import AVERAGED, LINEAR, LONGEST, SHARP, SHORTEST, WRITTEN
from xarch_kd.models.conversion.mixers import GATE_OPEN
from xarch_kd.testing.tiny import VOCABULARY, tiny_model

HEADS = 4


def heads_of(rows: Tensor) -> Tensor:
    """[batch, time, given × 16] as [batch, time, 4, 16], shared heads repeated."""
    apart = rearrange(rows, "b t (g d) -> b t g d", d=16)
    return repeat(apart, "b t g d -> b t (g n) d", n=HEADS // apart.shape[2])


def white_size(rows: Tensor, norm: Tensor) -> Tensor:
    """Root mean square of each head's projection of a white input under the norm's weights, [4]."""
    given = rearrange((rows * norm).square().sum(dim=1), "(g d) -> g d", d=16).mean(dim=1).sqrt()
    return repeat(given, "g -> (g n)", n=HEADS // len(given))


def recurrence(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """The gated delta rule token by token; query, key, value [batch, time, heads, 16], beta [batch, time]."""
    state = torch.zeros(query.shape[0], HEADS, 16, 16)
    made = []
    for time in range(query.shape[1]):
        read = key[:, time]
        state = state * decay[:, None, None]
        error = value[:, time] - einsum(state, read, "b h k v, b h k -> b h v")
        state = state + einsum(read, error, beta[:, time], "b h k, b h v, b -> b h k v")
        made.append(einsum(state, query[:, time], "b h k v, b h k -> b h v") / 4.0)
    return torch.stack(made, dim=1)


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True}, {"num_key_value_heads": 4}])
@torch.no_grad()
def test_a_mixer_made_from_attention_computes_the_closed_form(overrides: dict[str, Any]) -> None:
    teacher = tiny_model("qwen3", **overrides)
    mixer = convert(teacher, mixer="gated_delta", replace=[1]).model.layers[1].linear_attn
    attention, norm = teacher.model.layers[1].self_attn, teacher.model.layers[1].input_layernorm.weight
    constant = activation_stats(teacher, [1])[1].constant
    inputs = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0))
    one = inputs @ constant

    def projected(name: str, scale: float, channels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layer, rows = getattr(attention, name), getattr(attention, name).weight
        made = inputs @ rows.T
        if layer.bias is not None:
            made, rows = made + one[..., None] * layer.bias, rows + layer.bias[:, None] * constant
        if channels is not None:
            factors = channels.repeat(len(rows) // 16)
            made, rows = made * factors, rows * factors[:, None]
        size = white_size(rows, norm)
        return functional.silu(heads_of(made) * (scale / size)[:, None]), size

    query, _ = projected("q_proj", SHARP, attention.q_norm.weight)
    key, _ = projected("k_proj", SHARP, attention.k_norm.weight)
    value, size = projected("v_proj", LINEAR)
    beta = torch.sigmoid(one * math.log(WRITTEN / (1 - WRITTEN)))
    decay = torch.exp(-1.0 / torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), HEADS))
    # The mixer's own guard against a length of zero is 1e-6 under the root.
    query, key = (rows * torch.rsqrt(rows.square().sum(dim=-1, keepdim=True) + 1e-6) for rows in (query, key))
    inner = recurrence(query, key, value, beta, decay)
    inner = inner * torch.rsqrt(inner.square().mean(dim=-1, keepdim=True) + teacher.config.rms_norm_eps)
    inner = inner * functional.silu(GATE_OPEN * one)[..., None, None] * (AVERAGED * size)[:, None]
    expected = rearrange(inner, "b t h d -> b t (h d)") @ attention.o_proj.weight.T
    torch.testing.assert_close(mixer(inputs), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_constant_of_a_block_is_near_one_wherever_its_inputs_share_a_mean() -> None:
    teacher = tiny_model("llama")
    # A shared mean as large as the rest of the embedding.
    teacher.model.embed_tokens.weight += 1.0
    stats = activation_stats(teacher, [0, 2])
    seen: list[Tensor] = []
    teacher.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, given, named: seen.append(named["hidden_states"]), with_kwargs=True
    )
    teacher(torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5)))
    one = seen[0] @ stats[0].constant
    assert 0.9 < float(one.mean()) < 1.1
    assert float(one.std()) < 0.3
    assert stats[0].mixer_input_size == pytest.approx(float(seen[0].square().mean(-1).sqrt().mean()), rel=0.05)


def test_moments_leave_the_teacher_as_it_was() -> None:
    teacher = tiny_model("llama").train()
    assert activation_stats(teacher, []) == {}
    first, second = (activation_stats(teacher, [1])[1] for _ in range(2))
    assert torch.equal(first.constant, second.constant)
    assert teacher.training
    assert not any(module._forward_hooks for module in teacher.modules())
    assert ROWS % 2 == 0 and ROWS * TOKENS == 2048


@torch.no_grad()
def test_where_a_norm_follows_attention_its_size_is_measured() -> None:
    teacher = tiny_model("olmo2")
    student = convert(teacher, mixer="gated_delta", replace=[1])
    block, made = teacher.model.layers[1], student.model.layers[1]
    stats = activation_stats(teacher, [1])[1]
    # The teacher's attention reads its input as it is, so the norm that now precedes the mixer restores its size.
    usual = torch.full((64,), stats.mixer_input_size)
    torch.testing.assert_close(made.input_layernorm.weight, usual)
    size = white_size(block.self_attn.v_proj.weight, usual)
    columns = repeat(size, "h -> (h d)", d=16)
    rows = block.post_attention_layernorm.weight / stats.mixer_output_size
    expected = rows[:, None] * block.self_attn.o_proj.weight * columns
    torch.testing.assert_close(made.linear_attn.o_proj.weight, expected)
    # Else beta would start at twice what the recipe says.
    assert not made.linear_attn.allow_neg_eigval


@pytest.mark.parametrize("model_type", ["qwen3", "olmo2"])
@torch.no_grad()
def test_random_mixers_are_the_same_for_the_same_seed_and_differ_by_block(model_type: str) -> None:
    teacher = tiny_model(model_type)
    first, again, other = (
        convert(teacher, mixer="gated_delta", replace=[0, 1], init="random", seed=seed, check=False).state_dict()
        for seed in (3, 3, 4)
    )
    name = "model.layers.1.linear_attn.conv1d.weight"
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("1", "0", 1)])
    step = functional.softplus(first["model.layers.1.linear_attn.dt_bias"])
    assert bool(((step >= 0.999e-3) & (step <= 0.1001)).all())


@pytest.mark.parametrize("model_type", ["qwen3", "olmo2", "llama"])
def test_every_parameter_of_a_new_mixer_learns(model_type: str) -> None:
    student: PreTrainedModel = convert(tiny_model(model_type), mixer="gated_delta", replace=[1])
    rows = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    student(rows, labels=rows).loss.backward()
    silent = [
        name
        for name, parameter in student.named_parameters()
        if ".linear_attn." in name and (parameter.grad is None or not parameter.grad.any())
    ]
    assert silent == []
