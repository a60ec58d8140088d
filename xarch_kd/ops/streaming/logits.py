"""Products of a chunk of tokens with a head, whatever dtype the head is kept in."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.ops.heads import Head

# Entries of a head that are converted, or multiplied on a CPU, at a time: 2 MiB of float32 stay in its cache.
BLOCK_ELEMENTS = 1 << 19
FEWEST_ROWS = 256


def blocks(rows: int, width: int, whole: bool) -> list[slice]:
    """Return the row ranges in which a head [rows, dim] is read: one, or blocks."""
    step = rows if whole else max(FEWEST_ROWS, BLOCK_ELEMENTS // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def raw_logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Write hidden weightᵀ [tokens, vocabulary] into `out` and return it; `hidden` has the dtype of `out`.

    A CPU's library multiplies by blocks of the head some 15 % faster than by all of a long one.
    """
    whole = weight.dtype == out.dtype and weight.device.type != "cpu"
    for rows in blocks(out.shape[-1], weight.shape[-1], whole):
        torch.mm(hidden, weight[rows].to(out.dtype).T, out=out[:, rows])
    return out


def finish_logits(raw: Tensor, head: Head) -> Tensor:
    """Return softcap(scale * (raw + bias)) of a few rows, written over `raw`."""
    if head.bias is not None:
        raw.add_(head.bias[: raw.shape[-1]].to(raw.dtype))
    if head.scale != 1.0:
        raw.mul_(head.scale)
    if head.softcap is not None:
        raw.div_(head.softcap).tanh_().mul_(head.softcap)
    return raw


def logits_into(out: Tensor, hidden: Tensor, head: Head) -> Tensor:
    """Write the logits [tokens, vocabulary] of `hidden`, which has the dtype of `out`, into `out` and return it."""
    return finish_logits(raw_logits_into(out, hidden, head.weight), head)


def through_head(gradient: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient [tokens, vocabulary] times weight in `dtype`, multiplied in the dtype of `gradient`."""
    parts = blocks(gradient.shape[-1], weight.shape[-1], weight.dtype == gradient.dtype)
    out = (gradient[:, parts[0]] @ weight[parts[0]].to(gradient.dtype)).to(dtype)
    for rows in parts[1:]:
        out.add_(gradient[:, rows] @ weight[rows].to(gradient.dtype))
    return out


def add_head_gradient(out: Tensor, gradient: Tensor, hidden: Tensor, *, first: bool) -> None:
    """Add gradientᵀ hidden [vocabulary, dim] to `out`, which may be wider than what is multiplied.

    The first one is written, whatever `out` holds: it is as large as the head, and need not be filled before.
    """
    if out.dtype == gradient.dtype:
        out.addmm_(gradient.T, hidden, beta=0 if first else 1)
        return
    for rows in blocks(*out.shape, whole=False):
        product = gradient[:, rows].T @ hidden
        _ = out[rows].copy_(product) if first else out[rows].add_(product)
