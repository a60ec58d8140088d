"""The token objective: next-token distributions of student and teacher, and the data's next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.losses.features import divisor
from xarch_kd.ops.dispatch import Impl
from xarch_kd.ops.divergences import Divergence, DivergenceFormula, DivergenceKind
from xarch_kd.ops.heads import Head
from xarch_kd.ops.linear_divergence import linear_divergence
from xarch_kd.ops.streaming.top_k import streamed_top_k

IGNORED_LABEL: Final = -100


class TokenLoss(NamedTuple):
    """This micro-batch's share of the objective, and of its parts.

    Only `total` has a gradient. `divergence` (the plain one, without T² and weight) and `cross_entropy`, in nats, are
    detached; added up over the micro-batches of a step they are means over its tokens.

    >>> import torch
    >>> from xarch_kd.losses import TokenLoss
    >>> TokenLoss(torch.tensor(1.5), torch.tensor(1.0), torch.tensor(0.5)).total
    tensor(1.5000)
    """

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def next_token_labels(
    input_ids: Tensor, attention_mask: Tensor | None = None, *, labels: Tensor | None = None
) -> Tensor:
    """Return the label of each position [batch, time]: the token that follows it, or -100 where none counts.

    Position t counts when t and t+1 are both unmasked. `labels`, unshifted and with -100 where a token is not to be
    predicted (for example in a prompt), narrows that; where it is not -100 it is the token predicted.

    >>> import torch
    >>> from xarch_kd.losses import next_token_labels
    >>> next_token_labels(torch.tensor([[3, 4, 5]]))
    tensor([[   4,    5, -100]])
    """
    if input_ids.dim() != 2:
        raise UsageError("input_ids does not fit.", found=list(input_ids.shape), allowed="[batch, time]")
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise UsageError(f"{name} does not fit.", found=list(tensor.shape), allowed=list(input_ids.shape))
    shifted = torch.full_like(input_ids, IGNORED_LABEL, dtype=torch.long)
    shifted[:, :-1] = (input_ids if labels is None else labels)[:, 1:]
    if attention_mask is not None:
        mask = attention_mask.bool()
        shifted[:, :-1].masked_fill_(~(mask[:, :-1] & mask[:, 1:]), IGNORED_LABEL)
    return shifted


def label_count(labels: Tensor) -> Tensor:
    """Return the number of positions whose label counts, a float64 scalar.

    >>> import torch
    >>> from xarch_kd.losses import label_count
    >>> label_count(torch.tensor([[3, -100, 5]]))
    tensor(2., dtype=torch.float64)
    """
    return (labels != IGNORED_LABEL).sum().double()


def token_loss(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    *,
    normalizer: Tensor | float,
    divergence: DivergenceKind | Mapping[str, Any] | Divergence | DivergenceFormula = "forward_kl",
    temperature: float = 1.0,
    weight: float = 1.0,
    cross_entropy: float = 0.0,
    temperature_squared: bool = True,
    vocabulary: int | None = None,
    logits_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    impl: Impl | str = "auto",
    top_k: int | None = None,
) -> TokenLoss:
    """Return this micro-batch's share of weight * T² * D + cross_entropy * CE, means over the step's tokens.

    Hidden states are [batch, time, dim] after the final norm; `labels` [batch, time] come from `next_token_labels`;
    `normalizer` is the sum over the micro-batches, and ranks, of the step of `label_count`.

    With `top_k` the teacher's k likeliest tokens and one bucket for all others are compared (`ops.TeacherTopK`).
    Without the bucket reverse KL would be lowest for a student that avoids these tokens: it cannot be left out.

    Raises:
        UsageError: shapes or options that do not fit.
        NonFiniteLoss: the value of a valid token is NaN or infinite.

    >>> import torch
    >>> from xarch_kd.losses import Head, label_count, next_token_labels, token_loss
    >>> hidden, head = torch.randn(1, 6, 8), Head(torch.randn(50, 8))
    >>> labels = next_token_labels(torch.arange(6)[None])
    >>> loss = token_loss(hidden, head, hidden, head, labels, normalizer=label_count(labels))
    >>> abs(float(loss.divergence)) < 1e-3
    True
    """
    factor = temperature**2 if temperature_squared else 1.0
    entries = None
    if top_k is not None:
        rows = min(student_head.weight.shape[0], teacher_head.weight.shape[0]) if vocabulary is None else vocabulary
        if top_k >= rows:
            raise UsageError(
                "top_k leaves no token for the bucket of all others.", asked=top_k, allowed=f"at most {rows - 1}"
            )
        entries = streamed_top_k(teacher_hidden, teacher_head, top_k, temperature=temperature, vocabulary=rows)
    sums = linear_divergence(
        student_hidden,
        student_head,
        teacher_hidden if entries is None else entries,
        teacher_head if entries is None else None,
        divergence=divergence,
        temperature=temperature,
        labels=labels,
        divergence_weight=weight * factor,
        cross_entropy=cross_entropy,
        vocabulary=vocabulary,
        logits_dtype=logits_dtype,
        reduction="sum",
        impl=impl,
    )
    assert sums.cross_entropy is not None
    by = divisor(normalizer, sums.total)
    return TokenLoss(sums.total / by, sums.divergence / by, sums.cross_entropy / by)
