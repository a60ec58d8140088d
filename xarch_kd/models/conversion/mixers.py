"""Initial weights of a Mamba-2 mixer, from the attention that it replaces or random.

A mixer (Dao and Gu 2024, https://arxiv.org/abs/2405.21060, equation 16 and figure 6) computes in each head

    y_t = Σ_{s≤t} exp(−a Σ_{s<r≤t} δ_r) δ_s (C_t·B_s) x_s + D x_t

with x, B, C = silu(conv(x, B, C projections)), and returns out_proj(norm(y × silu(z))), heads normalized separately.

The recipe `attention` gives q to C, k to B, v to x and o to out_proj, and chooses the rest so that the mixer starts as
near to attention as it can without data. Let r be the root mean square of v if its input were white with the weights
of the block's norm, r² = mean over a head's rows of Σ_i (W_v w)²_i:

- The convolution is the identity, its last tap alone being set, and z starts where silu(z) = 1.
- x: silu is not linear. With its tap at `LINEAR / r`, x stays small, where silu(x) = x/2 + x²/4 is nearly linear; the
  norm undoes the scale.
- B, C: silu(q)·silu(k) is a nearly positive kernel that grows with q·k, as the softmax's does; their tap is 1.
- Decay: a = 1 and δ = 1/τ, so a head averages over about τ tokens, log-spaced over the heads from `SHORTEST` to
  `LONGEST`. D = 0: attention has no path around the average.
- Without biases of the projections (`proj_bias: false`), those of queries, keys and values are the convolution's, and
  the gate is `GATE_OPEN` × a row along the mean input of the block (`activation_stats.py`): all channels of a token are
  gated alike, which the norm undoes wherever the gate is positive.
- Channels beyond the teacher's head hold its values again, unread by the output projection, as often as they fit; the
  rest is zero. So the norm's mean square is that of the head, and they can be put to use in training.
- Heads of a group share the mean of their queries and of their keys.
- The norm gives each head's output unit size, while attention's output has the size of an average of v. Its weight
  starts at `AVERAGED × r`: the best scale of a feature that correlates by ρ with its target is ρ times the target's, so
  too large an output does more harm than one too small.

The four constants were chosen on two blocks of SmolLM2-135M-Instruct (13 and 27 of 30, relative squared error of the
mixer's output on text of Python's documentation, at the start and after 24 steps of AdamW at 0.01): 0.48 and 0.23,
where an unscaled recipe (taps and norm weights 1, τ from 10 to 1000) starts at 6.1 and reaches 0.50.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional

from xarch_kd.models.conversion.teacher_spec import AttentionSpec
from xarch_kd.models.conversion.weights import AttentionWeights, LinearWeights

# silu(GATE_OPEN) = 1.
GATE_OPEN = 1.2784645427610738

SHORTEST, LONGEST = 1.0, 64.0
LINEAR = 0.25
AVERAGED = 0.2


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """Sizes of a mixer: `channels` per head, `state` numbers per channel, `groups` of heads that share B and C.

    Each head is a group of its own if `groups` is None. `proj_bias` is that of both projections of Mamba-2.
    """

    width: int
    heads: int
    channels: int
    state: int
    convolution: int
    groups: int | None = None
    proj_bias: bool = True


def mixer_from_attention(
    block: AttentionWeights, spec: AttentionSpec, shape: MixerShape, constant: Tensor | None = None
) -> dict[str, Tensor]:
    """Return a mixer's state, in float32, made from a block's attention by the recipe above.

    `constant` [width], whose product with every input is near 1, is needed without biases of the projections.
    """
    copies = max(shape.channels // spec.head_dim, 1)
    values = _in_heads(block.value, spec.key_value_heads, shape.heads, spec.head_dim).repeat(1, copies, 1)
    values = functional.pad(values, (0, 0, 0, shape.channels - values.shape[1]))
    keys = _shared(_in_heads(block.key, spec.key_value_heads, shape.heads, shape.state), shape)
    queries = _shared(_in_heads(block.query, spec.heads, shape.heads, shape.state), shape)
    size = _value_size(block, spec, shape.heads)
    gate = torch.zeros(shape.heads * shape.channels, shape.width + 1, device=size.device)
    gate[:, -1] = GATE_OPEN
    step = torch.zeros(shape.heads, shape.width + 1, device=size.device)
    rows = torch.cat([gate, *(rearrange(part, "h c w -> (h c) w") for part in (values, keys, queries)), step])
    taps = torch.ones(len(rows) - len(gate) - shape.heads, device=size.device)
    taps[: len(gate)] = repeat(LINEAR / size, "h -> (h c)", c=shape.channels)
    output = rearrange(block.output.weight.float(), "w (h d) -> w h d", h=spec.heads)
    output = functional.pad(output, (0, shape.channels - spec.head_dim))
    horizon = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), shape.heads, device=size.device)
    # The norm's mean square runs over the zeros of a padded head too.
    used = math.sqrt(copies * spec.head_dim / shape.channels)
    state = {
        "in_proj.weight": rows[:, :-1].contiguous(),
        "in_proj.bias": rows[:, -1].contiguous(),
        "conv1d.weight": last_tap(taps, shape.convolution),
        "conv1d.bias": torch.zeros_like(taps),
        "dt_bias": inverse_softplus(1.0 / horizon),
        "A_log": torch.zeros_like(horizon),
        "D": torch.zeros_like(horizon),
        "norm.weight": repeat(AVERAGED * used * size, "h -> (h c)", c=shape.channels),
        "out_proj.weight": rearrange(output, "w h c -> w (h c)"),
        "out_proj.bias": _bias(block.output),
    }
    return state if shape.proj_bias else _without_biases(state, gates=len(gate), steps=shape.heads, constant=constant)


def _without_biases(state: dict[str, Tensor], *, gates: int, steps: int, constant: Tensor | None) -> dict[str, Tensor]:
    """Return a mixer's state without biases of its projections, by the recipe above."""
    assert constant is not None
    bias = state.pop("in_proj.bias")
    del state["out_proj.bias"]
    state["in_proj.weight"][:gates] = bias[:gates, None] * constant.float()
    state["conv1d.bias"] = state["conv1d.weight"][:, 0, -1] * bias[gates:-steps]
    return state


def random_mixer(
    shape: MixerShape, *, layers: int, spread: float, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Return a mixer's state, in float32, drawn as the authors of Mamba-2 do; the same seed gives the same weights.

    δ is log-uniform in [0.001, 0.1], a uniform in [1, 16], D = 1, projections normal of standard deviation `spread`,
    the output projection's divided by √(2 × layers).
    """
    generator = torch.Generator().manual_seed(seed)
    inner = shape.heads * shape.channels
    convolved = inner + 2 * (shape.groups or shape.heads) * shape.state
    bound = shape.convolution**-0.5
    step = torch.exp(uniform((shape.heads,), math.log(1e-3), math.log(1e-1), generator))
    state = {
        "in_proj.weight": spread * torch.randn(inner + convolved + shape.heads, shape.width, generator=generator),
        "in_proj.bias": torch.zeros(inner + convolved + shape.heads),
        "conv1d.weight": uniform((convolved, 1, shape.convolution), -bound, bound, generator),
        "conv1d.bias": torch.zeros(convolved),
        "dt_bias": inverse_softplus(step),
        "A_log": torch.log(uniform((shape.heads,), 1.0, 16.0, generator)),
        "D": torch.ones(shape.heads),
        "norm.weight": torch.ones(inner),
        "out_proj.weight": spread * (2 * layers) ** -0.5 * torch.randn(shape.width, inner, generator=generator),
        "out_proj.bias": torch.zeros(shape.width),
    }
    if not shape.proj_bias:
        state = {name: value for name, value in state.items() if name not in ("in_proj.bias", "out_proj.bias")}
    return {name: value.to(device) for name, value in state.items()}


def inverse_softplus(value: Tensor) -> Tensor:
    """Return x with softplus(x) = value, for value > 0."""
    return value + torch.log(-torch.expm1(-value))


def _in_heads(projection: LinearWeights, given: int, heads: int, size: int) -> Tensor:
    """Return weight and bias as [heads, size, width + 1]: each given head repeated, its channels padded with zeros.

    Consecutive query heads share a key and value head, so each is repeated in place.
    """
    rows = torch.cat([projection.weight.float(), _bias(projection)[:, None]], dim=1)
    rows = repeat(rearrange(rows, "(g d) w -> g d w", g=given), "g d w -> (g n) d w", n=heads // given)
    return functional.pad(rows, (0, 0, 0, size - rows.shape[1]))


def _shared(rows: Tensor, shape: MixerShape) -> Tensor:
    """Return rows [heads, state, …] as [groups, state, …], the mean over the heads of a group."""
    groups = shape.groups or shape.heads
    return rows if groups == shape.heads else rearrange(rows, "(g n) d w -> g n d w", g=groups).mean(dim=1)


def _value_size(block: AttentionWeights, spec: AttentionSpec, heads: int) -> Tensor:
    """Return r of the recipe, [heads], never zero."""
    weight = block.value.weight.float() * block.mixer_norm.float()
    rows = weight.square().sum(dim=1) + _bias(block.value).square()
    given = rearrange(rows, "(g d) -> g d", g=spec.key_value_heads).mean(dim=1).sqrt()
    return repeat(given, "g -> (g n)", n=heads // spec.key_value_heads).clamp_min(1e-6)


def _bias(projection: LinearWeights) -> Tensor:
    if projection.bias is not None:
        return projection.bias.float()
    return torch.zeros(projection.weight.shape[0], device=projection.weight.device)


def last_tap(taps: Tensor, convolution: int) -> Tensor:
    """Return a depthwise kernel [channels, 1, convolution] that scales the current token by `taps`."""
    return functional.pad(taps[:, None, None], (convolution - 1, 0))


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return numbers of `shape` drawn evenly between `low` and `high`."""
    return low + (high - low) * torch.rand(shape, generator=generator)
