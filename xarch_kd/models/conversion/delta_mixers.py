"""Initial weights of a gated delta mixer, from the attention that it replaces or random.

A mixer (Yang, Kautz and Hatamizadeh 2024, https://arxiv.org/abs/2412.06464, equation 10) keeps in each head a matrix

    S_t = exp(−a δ_t) S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ,    y_t = S_t q_t / √d

with q, k, v = silu(conv(projections)), q and k divided by their lengths, β a sigmoid and δ a softplus of projections,
and returns output(norm(y) × silu(gate)), where each head is normalized separately with shared weights.

The recipe `attention` gives q, k, v and o of the attention to the four projections of these names, the norms of queries
and keys multiplied into their rows. The rest:

- No projection has a bias. `ActivationStats.constant` is a row whose product with every input is near 1; the biases of
  the attention, the gate and β are multiples of it. The gate starts where silu(gate) = 1, β at `WRITTEN`.
- The convolution is the identity, its last tap alone being set. silu is not linear. Let r be the root mean
  square of a head's projection if its input were white with the weights of the block's norm. With its tap at
  `LINEAR / r`, v stays where silu is nearly linear, and the norm undoes the scale. The taps of q and k are `SHARP / r`:
  only their directions matter, and silu then nearly removes negative values, so that a head's kernel is nearly
  non-negative.
- Decay: exp(−1/τ) per token, τ log-spaced over the heads from `SHORTEST` to `LONGEST`, equal for all tokens.
- The norm gives each head's output unit size, as in `mixers.py`, and its weight is `AVERAGED`. The heads' own sizes r
  are multiplied into the output projection.

The constants were chosen on four blocks of SmolLM2-135M-Instruct (6, 13, 20 and 27 of 30) by the relative squared error
of the mixers' output and by the student's likelihood, on text of Python's documentation. With these four replaced and
nothing trained the student has 3.30 nats per token on two held-out rows of 256 tokens; the teacher 3.01, random mixers
or none 3.59, Mamba-2 mixers by `mixers.py` 3.43. On two other rows it has 3.20; the teacher 2.91, no mixers 3.31. After
24 steps of AdamW at 0.01 the errors of blocks 13 and 27 are 0.36 and 0.13, from random weights 0.60 and 0.25.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor

from xarch_kd.models.conversion.activation_stats import ActivationStats
from xarch_kd.models.conversion.mixers import GATE_OPEN, MixerShape, inverse_softplus, last_tap, uniform
from xarch_kd.models.conversion.teacher_spec import AttentionSpec
from xarch_kd.models.conversion.weights import AttentionWeights, LinearWeights

WRITTEN = 0.3
SHARP = 6.0
LINEAR = 0.5
SHORTEST, LONGEST = 16.0, 256.0
AVERAGED = 0.3


def delta_from_attention(
    block: AttentionWeights, spec: AttentionSpec, shape: MixerShape, stats: ActivationStats
) -> dict[str, Tensor]:
    """Return a mixer's state, in float32, made from a block's attention by the recipe above."""
    constant = stats.constant.float()
    norm = constant.new_full(constant.shape, stats.mixer_input_size) if spec.norm_after else block.mixer_norm.float()
    query = _in_heads(block.query, block.query_norm, spec.heads, shape.heads, constant)
    key = _in_heads(block.key, block.key_norm, spec.key_value_heads, shape.heads, constant)
    value = _in_heads(block.value, None, spec.key_value_heads, shape.heads, constant)
    value_size = _size(value, norm)
    scales = (SHARP / _size(query, norm), SHARP / _size(key, norm), LINEAR / value_size)
    taps = repeat(torch.stack(scales), "p h -> (p h d)", d=spec.head_dim)
    output = rearrange(block.output.weight.float(), "w (h d) -> w h d", h=spec.heads) * value_size[:, None]
    output = rearrange(output, "w h d -> w (h d)")
    if spec.norm_after:
        output = output * (block.mixer_norm.float() / stats.mixer_output_size)[:, None]
    horizon = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), shape.heads, device=constant.device)
    return {
        "query": rearrange(query, "h d w -> (h d) w"),
        "key": rearrange(key, "h d w -> (h d) w"),
        "value": rearrange(value, "h d w -> (h d) w"),
        "gate": repeat(GATE_OPEN * constant, "w -> r w", r=shape.heads * shape.channels).clone(),
        "beta": repeat(math.log(WRITTEN / (1.0 - WRITTEN)) * constant, "w -> h w", h=shape.heads).clone(),
        "step": torch.zeros(shape.heads, shape.width, device=constant.device),
        "convolution": last_tap(taps, shape.convolution),
        "dt_bias": inverse_softplus(1.0 / horizon),
        "A_log": torch.zeros_like(horizon),
        "norm": constant.new_full((shape.channels,), AVERAGED),
        "output": output,
    }


def random_delta(
    shape: MixerShape, *, layers: int, spread: float, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Return a mixer's state, in float32, drawn as the authors do; the same seed gives the same weights.

    δ is log-uniform in [0.001, 0.1], a uniform in [0.01, 16], projections normal of standard deviation `spread`, the
    output projection's divided by √(2 × layers).
    """
    generator = torch.Generator().manual_seed(seed)
    keys, values = shape.heads * shape.state, shape.heads * shape.channels
    rows = {"query": keys, "key": keys, "value": values, "gate": values, "beta": shape.heads, "step": shape.heads}
    state = {name: spread * torch.randn(count, shape.width, generator=generator) for name, count in rows.items()}
    bound = shape.convolution**-0.5
    step = torch.exp(uniform((shape.heads,), math.log(1e-3), math.log(1e-1), generator))
    state |= {
        "convolution": uniform((2 * keys + values, 1, shape.convolution), -bound, bound, generator),
        "dt_bias": inverse_softplus(step),
        "A_log": torch.log(uniform((shape.heads,), 0.01, 16.0, generator)),
        "norm": torch.ones(shape.channels),
        "output": spread * (2 * layers) ** -0.5 * torch.randn(shape.width, values, generator=generator),
    }
    return {name: value.to(device) for name, value in state.items()}


def _in_heads(projection: LinearWeights, norm: Tensor | None, given: int, heads: int, constant: Tensor) -> Tensor:
    """Return weights as [heads, head_dim, width]: the bias as a multiple of `constant`, each given head repeated."""
    rows = projection.weight.float()
    if projection.bias is not None:
        rows = rows + projection.bias.float()[:, None] * constant
    apart = rearrange(rows, "(g d) w -> g d w", g=given)
    if norm is not None:
        # [head_dim], the same for all heads, or [given × head_dim].
        apart = apart * norm.float().view(-1, apart.shape[1])[:, :, None]
    return repeat(apart, "g d w -> (g n) d w", n=heads // given)


def _size(rows: Tensor, norm: Tensor) -> Tensor:
    """Return r of the recipe, [heads], never zero, for rows [heads, head_dim, width]."""
    return (rows * norm).square().sum(dim=-1).mean(dim=-1).sqrt().clamp_min(1e-6)
