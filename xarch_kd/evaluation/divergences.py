"""Divergences of two models' next-token distributions at each token of the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xarch_kd.errors import NonFiniteLoss
from xarch_kd.ops.heads import Head
from xarch_kd.ops.streaming.logits import logits_into
from xarch_kd.taps.layout import Layout, run_base

# Bytes of one model's logits that exist at a time.
CHUNK_BYTES: Final = 64 << 20
# log sigmoid of 0, as float32 rounds it.
HALF: Final = float(logsigmoid(torch.zeros(())))


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenDivergences:
    """Figures of teacher T and student S at each predicted token, each [rows, tokens] on the CPU.

    In nats, over the whole vocabulary: `forward_kl` is KL(T ‖ S), `reverse_kl` KL(S ‖ T), `jensen_shannon` at most
    ln 2. `total_variation` is half of the sum of |T - S|, at most 1. `teacher_nll` and `student_nll` are those of the
    row's own next token; `agree` is 1 where both have the same most likely token, `teacher_right` and `student_right`
    where it is the row's own.
    """

    forward_kl: Tensor
    reverse_kl: Tensor
    jensen_shannon: Tensor
    total_variation: Tensor
    teacher_nll: Tensor
    student_nll: Tensor
    agree: Tensor
    teacher_right: Tensor
    student_right: Tensor


NAMES: Final = tuple(TokenDivergences.__dataclass_fields__)


def head_of(layout: Layout) -> Head:
    """Return the head of a model."""
    return Head(layout.head_weight, layout.head_bias, layout.logit_scale, layout.logit_softcap)


@torch.inference_mode()
def token_divergences(
    teacher: Layout,
    student: Layout,
    ids: Tensor,
    *,
    start: int = 1,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> TokenDivergences:
    """Return the divergences at the tokens `start` to the last of rows `ids` [rows, time], from all tokens before each.

    `start` is at least 1. Models with vocabularies of different sizes are compared over the smaller one's tokens,
    renormalized. `progress` is called with the tokens that both models have read so far. Raises NonFiniteLoss for
    logits that are NaN or infinite.
    """
    parts: list[Tensor] = []
    for first in range(0, len(ids), batch_size):
        rows = ids[first : first + batch_size]
        hidden = [_hidden(layout, rows, start) for layout in (teacher, student)]
        labels = rows[:, start:].to(hidden[0].device).reshape(-1)
        parts.append(_rows(teacher, student, hidden[0], hidden[1], labels).view(len(NAMES), len(rows), -1))
        if progress is not None:
            progress((first + len(rows)) * 2 * ids.shape[1])
    whole = torch.cat(parts, 1)
    return TokenDivergences(**dict(zip(NAMES, whole, strict=True)))


def _hidden(layout: Layout, rows: Tensor, start: int) -> Tensor:
    """Return the hidden states [rows * predicted tokens, dim] from which the tokens from `start` on are predicted."""
    hidden = run_base(layout, rows.to(layout.head_weight.device))[:, start - 1 : -1].flatten(0, 1)
    if not bool(torch.isfinite(hidden).all()):
        raise NonFiniteLoss(f"a hidden state of {type(layout.model).__name__} is not finite", asked="divergences")
    return hidden


def _rows(teacher: Layout, student: Layout, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    vocabulary = min(len(teacher.head_weight), len(student.head_weight))
    step = max(1, CHUNK_BYTES // (4 * max(len(teacher.head_weight), len(student.head_weight))))
    found = torch.empty(len(NAMES), len(labels))
    for start in range(0, len(labels), step):
        piece = slice(start, start + step)
        log_p, log_q = (
            _log_probs(layout, hidden[piece], vocabulary).to(first.device)
            for layout, hidden in ((teacher, first), (student, second))
        )
        found[:, piece] = _figures(log_p, log_q, labels[piece]).cpu()
    return found


def _log_probs(layout: Layout, hidden: Tensor, vocabulary: int) -> Tensor:
    head = head_of(layout)
    out = torch.empty(len(hidden), len(head.weight), dtype=torch.float32, device=hidden.device)
    return logits_into(out, hidden.float(), head)[:, :vocabulary].log_softmax(-1)


def _figures(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    """Return the figures [figures, tokens] of log-probabilities [tokens, vocabulary], in the order of NAMES."""
    p, q = log_p.exp(), log_q.exp()
    gap = log_p - log_q
    at = labels[:, None]
    best_p, best_q = log_p.argmax(-1), log_q.argmax(-1)
    return torch.stack(
        [
            (p * gap).sum(-1),
            -(q * gap).sum(-1),
            # log p - log((p + q) / 2) = log 2 + log sigmoid(log p - log q), exactly 0 for equal models.
            0.5 * ((p * (logsigmoid(gap) - HALF)).sum(-1) + (q * (logsigmoid(-gap) - HALF)).sum(-1)),
            0.5 * (p - q).abs().sum(-1),
            -log_p.gather(-1, at)[:, 0],
            -log_q.gather(-1, at)[:, 0],
            (best_p == best_q).float(),
            (best_p == labels).float(),
            (best_q == labels).float(),
        ]
    )
