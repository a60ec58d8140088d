"""Rows of a teacher that is given as named entries and a tail."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xarch_kd.ops.divergence_rows import Rows, distribution
from xarch_kd.ops.divergences import Divergence
from xarch_kd.ops.streaming.row_gradients import rows_with_gradient
from xarch_kd.ops.teacher import Buckets


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
