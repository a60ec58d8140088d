"""Chunked scan: decayed sums over earlier tokens, with time and memory linear in the sequence length.

Within a chunk all pairs of tokens are computed; between chunks a state is carried. Tokens are processed in segments
that are recomputed in the backward pass, so that only the pairs of one segment are in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from xarch_kd.mixing.decay import remaining, running_sum, spread, tile

# Maximum number of exponents per segment.
SEGMENT_ELEMENTS: Final = {"cpu": 1 << 20, "other": 1 << 26}
CHUNK: Final = 64
SMALL_CHUNK: Final = 16

Result = TypeVar("Result")
Segment = Callable[..., tuple[Tensor, Tensor]]


def chunk_size(state: int) -> int:
    """Return the number of tokens per chunk for a state of `numbers` elements and scalar decay."""
    return CHUNK if state > CHUNK else SMALL_CHUNK


def scan(
    left: Tensor, right: Tensor, log_decay: Tensor, values: Tensor, *, size: int, rate: Tensor | None = None
) -> Tensor:
    """Return y_i = Σ_{j<=i} Σ_n left_in right_jn exp(c_in − c_jn) v_j [batch, heads, time, dim].

    left and right [batch, groups, time, n], values [batch, heads, time, dim]; c is the running sum of log_decay
    [batch, heads, time] or [batch, heads, time, n], times rate [heads, n] if given. A chunk has `size` tokens.
    """
    heads, states = values.shape[1], left.shape[-1]
    per_pair = 1 if rate is None and log_decay.dim() == 3 else states

    def segment(left: Tensor, right: Tensor, log_decay: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return _segment(left, right, chunk_sums(log_decay), values, state, rate)

    state = values.new_zeros(values.shape[0], heads, states, values.shape[-1])
    return in_segments(segment, (left, right, log_decay, values), state, size=size, per_pair=per_pair)


def in_segments(segment: Segment, inputs: tuple[Tensor, ...], state: Tensor, *, size: int, per_pair: int) -> Tensor:
    """Run `segment` over consecutive segments with a carried state; return the outputs [batch, heads, time, dim].

    `segment` takes its part of each input [batch, groups, time, ...], split into chunks [batch, groups, chunks, size,
    ...], and the state; it returns outputs in the same layout and the next state. The last chunk is zero-padded.
    `size` is a power of 2; `per_pair` is the number of exponents per pair of tokens of a chunk.
    """
    time = inputs[0].shape[2]
    size = min(size, 1 << (time - 1).bit_length())
    padding = -time % size
    # Split, not sliced: the gradient of a slice is as long as the sequence.
    chunked = [padded(tensor, padding).unflatten(2, (-1, size)) for tensor in inputs]
    exponents = state.shape[0] * state.shape[1] * size**2 * per_pair
    step = max(1, SEGMENT_ELEMENTS["cpu" if state.device.type == "cpu" else "other"] // exponents)
    pieces = list(zip(*(tensor.split(step, 2) for tensor in chunked), strict=True))
    run = recomputed if len(pieces) > 1 else _call
    outputs = []
    for piece in pieces:
        output, state = run(segment, *piece, state)
        outputs.append(output.flatten(2, 3))
    return torch.cat(outputs, 2)[:, :, :time]


def recomputed(function: Callable[..., Result], *tensors: Tensor) -> Result:
    """Return function(*tensors) with its intermediates recomputed in the backward pass instead of stored."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def _call(function: Callable[..., Result], *tensors: Tensor) -> Result:
    return function(*tensors)


def chunk_sums(log_decay: Tensor) -> Tensor:
    """Return the float64 running sums in each chunk [batch, heads, chunks, size, n or 1] of chunked decays."""
    sums = running_sum(log_decay, 3)
    return sums.unsqueeze(-1) if sums.dim() == 4 else sums


def padded(tensor: Tensor, padding: int) -> Tensor:
    """Return tensor [batch, groups, time, ...] with zeros after the last token."""
    return functional.pad(tensor, (*[0, 0] * (tensor.dim() - 3), 0, padding)) if padding else tensor


def _segment(
    left: Tensor, right: Tensor, sums: Tensor, values: Tensor, state: Tensor, rate: Tensor | None
) -> tuple[Tensor, Tensor]:
    heads, dtype = values.shape[1], values.dtype
    inner = tile(left, right, sums, rate) @ values
    before, end = torch.zeros_like(sums[..., :1, :]), sums[..., -1:, :]
    added = (spread(right, heads) * remaining(end, sums, dtype, rate)).transpose(-1, -2) @ values
    kept = remaining(end, before, dtype, rate).transpose(-1, -2)
    incoming = []
    for chunk_kept, chunk_added in zip(kept.unbind(2), added.unbind(2), strict=True):
        incoming.append(state)
        state = torch.addcmul(chunk_added, chunk_kept, state)
    outer = (spread(left, heads) * remaining(sums, before, dtype, rate)) @ torch.stack(incoming, 2)
    return inner + outer, state
