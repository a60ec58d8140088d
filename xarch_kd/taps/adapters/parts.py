"""Computations shared by several recurrent mixers, with their rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

WHOLE = slice(None)


def accumulated(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or float64 if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def short_convolution(
    sequence: Tensor, convolution: nn.Conv1d, activation: Callable[[Tensor], Tensor], channels: slice = WHOLE
) -> Tensor:
    """Return `activation` of the causal depthwise convolution of `sequence` [batch, time, channels], of that shape.

    `channels` are those of `convolution` that the sequence holds. The sum runs in the weight's dtype.
    """
    weight = convolution.weight[channels]
    bias = None if convolution.bias is None else convolution.bias[channels]
    padded = functional.pad(rearrange(sequence, "b t c -> b c t").to(weight.dtype), (weight.shape[-1] - 1, 0))
    convolved = functional.conv1d(padded, weight, bias, groups=weight.shape[0])
    return rearrange(activation(convolved).to(sequence.dtype), "b c t -> b t c")


def unit_length(vectors: Tensor) -> Tensor:
    """Return vectors [..., dim] divided by √(squared norm + 1e-6), in the accumulation dtype."""
    vectors = accumulated(vectors)
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + 1e-6)
