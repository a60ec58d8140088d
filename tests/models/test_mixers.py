from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.conversion.mixers import AVERAGED, GATE_OPEN, LINEAR, LONGEST, SHORTEST, inverse_softplus
from xarch_kd.testing.tiny import tiny_model

HEADS = 4


def projected(teacher: PreTrainedModel, name: str, inputs: Tensor) -> Tensor:
    """A projection of block 1's attention, [batch, time, heads, dim], key and value heads repeated."""
    made = rearrange(getattr(teacher.model.layers[1].self_attn, name)(inputs), "b t (h d) -> b t h d", d=16)
    return repeat(made, "b t g d -> b t (g n) d", n=HEADS // made.shape[2])


def value_size(teacher: PreTrainedModel, head_dim: int) -> Tensor:
    """Root mean square of each head's values if block 1's input were white under its norm's weights, [heads]."""
    attention, norm = teacher.model.layers[1].self_attn, teacher.model.layers[1].input_layernorm.weight
    bias = 0.0 if attention.v_proj.bias is None else attention.v_proj.bias
    rows = ((attention.v_proj.weight * norm).square().sum(dim=1) + bias**2).view(-1, head_dim)
    return repeat(rows.mean(dim=1).sqrt(), "g -> (g n)", n=HEADS // len(rows))


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True}, {"num_key_value_heads": 4}])
@torch.no_grad()
def test_a_mixer_made_from_attention_computes_the_closed_form(overrides: dict[str, Any]) -> None:
    teacher = tiny_model("llama", **overrides)
    mixer = convert(teacher, replace=[1]).model.layers[1].mamba
    inputs = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[Tensor, Tensor]] = []
    mixer.norm.register_forward_pre_hook(lambda _, given: seen.append((given[0], given[1])))
    output = mixer(inputs)

    attention, size = teacher.model.layers[1].self_attn, value_size(teacher, 16)
    value = functional.silu(projected(teacher, "v_proj", inputs) * (LINEAR / size)[:, None])
    key, query = (functional.silu(projected(teacher, name, inputs)) for name in ("k_proj", "q_proj"))
    horizon = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), HEADS)
    time = torch.arange(30.0)
    decay = torch.exp(-(time[:, None] - time) / horizon[:, None, None]).tril()
    mixing = einsum(query, key, "b t h n, b s h n -> b h t s") * decay / horizon[:, None, None]
    expected = einsum(mixing, value, "b h t s, b s h d -> b t h d")

    inner, gate = seen[0]
    torch.testing.assert_close(inner, rearrange(expected, "b t h d -> b t (h d)"), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(functional.silu(gate), torch.ones_like(gate))
    scaled = expected * torch.rsqrt(expected.square().mean(dim=-1, keepdim=True) + mixer.norm.variance_epsilon)
    scaled = scaled * (AVERAGED * size)[:, None]
    torch.testing.assert_close(
        output, attention.o_proj(rearrange(scaled, "b t h d -> b t (h d)")), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("head_dim", [24, 8])
@torch.no_grad()
def test_narrower_heads_are_repeated_as_often_as_they_fit_and_padded_with_zeros(head_dim: int) -> None:
    teacher = tiny_model("llama", head_dim=head_dim)
    student = convert(teacher, replace=[1])
    mixer, channels = student.model.layers[1].mamba, student.config.mamba_d_head
    assert channels > head_dim
    seen: list[Tensor] = []
    mixer.out_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    # Inputs large enough that the norm's epsilon does not count.
    mixer(10 * torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0)))
    heads = rearrange(seen[0], "b t (h c) -> b t h c", h=HEADS)
    copies = channels // head_dim
    assert copies == (1 if head_dim == 24 else 2)
    torch.testing.assert_close(heads[..., : copies * head_dim], heads[..., :head_dim].repeat(1, 1, 1, copies))
    assert not heads[..., copies * head_dim :].any()
    size = heads[..., :head_dim].square().mean(dim=-1).sqrt()
    torch.testing.assert_close(size, (AVERAGED * value_size(teacher, head_dim)).expand_as(size), rtol=1e-2, atol=0.0)


@torch.no_grad()
def test_random_mixers_are_the_same_for_the_same_seed_and_decay_slowly() -> None:
    teacher = tiny_model("llama")
    first, again, other = (
        convert(teacher, replace=[0, 1], init="random", seed=seed).state_dict() for seed in (3, 3, 4)
    )
    name = "model.layers.1.mamba.in_proj.weight"
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("1", "0")])
    step = functional.softplus(first["model.layers.1.mamba.dt_bias"])
    assert bool(((step >= 0.999e-3) & (step <= 0.1001)).all())
    assert bool((first["model.layers.1.mamba.A_log"].exp() <= 16.001).all())


def test_inverse_softplus_and_the_open_gate() -> None:
    values = torch.tensor([1e-4, 0.1, 1.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(functional.softplus(inverse_softplus(values)), values, rtol=1e-9, atol=0.0)
    assert abs(float(functional.silu(torch.tensor(GATE_OPEN, dtype=torch.float64))) - 1.0) < 1e-12


def test_every_parameter_of_a_new_mixer_learns() -> None:
    student = convert(tiny_model("qwen2"), replace=[1])
    rows = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    student(rows, labels=rows).loss.backward()
    silent = [
        name
        for name, parameter in student.named_parameters()
        if ".mamba." in name and (parameter.grad is None or not parameter.grad.any())
    ]
    assert silent == []
