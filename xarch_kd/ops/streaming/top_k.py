"""Rows of a teacher that is given as named entries and a tail."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xarch_kd.ops.divergence_rows import Rows, distribution
from xarch_kd.ops.divergences import Divergence
from xarch_kd.ops.heads import Head
from xarch_kd.ops.streaming.logits import logits_into
from xarch_kd.ops.streaming.nll import CHUNK_ELEMENTS
from xarch_kd.ops.streaming.row_gradients import rows_with_gradient
from xarch_kd.ops.teacher import Buckets, TeacherTopK


@torch.no_grad()
def streamed_top_k(
    hidden: Tensor, head: Head, k: int, *, temperature: float, vocabulary: int, chunk_size: int | None = None
) -> TeacherTopK:
    """Return the k likeliest of the first `vocabulary` tokens for hidden states [..., dim], by chunks of tokens.

    `k` is at most `vocabulary`.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk = min(chunk_size or max(1, CHUNK_ELEMENTS // vocabulary), len(flat))
    buffer = torch.empty(chunk, vocabulary, dtype=torch.float32, device=hidden.device)
    found = []
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(flat), chunk):
            rows = flat[start : start + chunk].float()
            logits = logits_into(buffer[: len(rows)], rows, head)
            found.append(TeacherTopK.from_logits(logits, k, temperature=temperature))
    leading = (*hidden.shape[:-1], k)
    return TeacherTopK(
        indices=torch.cat([rows.indices for rows in found]).reshape(leading),
        log_probabilities=torch.cat([rows.log_probabilities for rows in found]).reshape(leading),
    )


def rows_with_top_k(divergence: Divergence, student: Tensor, teacher: Buckets, gradient: bool) -> Rows:
    """Return D [rows] over the buckets and, if asked, ∂D/∂student [rows, vocabulary].

    `student` are logits over the temperature, which are left as they are. The tail's bucket has the logit
    log Σ_tail e^z, whose gradient to a logit of the tail is the share of that entry in the tail.
    """
    tail = distribution(student.scatter(-1, teacher.indices, -math.inf))
    buckets = torch.cat([student.gather(-1, teacher.indices), tail.top - torch.log(tail.likeliest)], -1)
    value, slope = rows_with_gradient(
        divergence, buckets, teacher.log_probabilities.to(student.dtype, copy=True), gradient
    )
    if slope is None:
        return value, None
    return value, tail.probabilities.mul_(slope[:, -1:]).scatter_(-1, teacher.indices, slope[:, :-1])
