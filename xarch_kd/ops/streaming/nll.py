"""Negative log-likelihood of tokens from hidden states and a head, without the logits of a whole batch."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from xarch_kd.ops.heads import Head
from xarch_kd.ops.streaming.logits import logits_into

# Logits held at a time: 256 tokens of a vocabulary of 128 K in float32 are 128 MiB.
CHUNK_ELEMENTS: Final = 32 << 20


def streamed_nll(hidden: Tensor, head: Head, labels: Tensor, chunk_size: int | None = None) -> Tensor:
    """Return -log softmax(logits)[label] of each token [tokens], float32, in nats."""
    vocabulary = head.weight.shape[0]
    chunk = min(chunk_size or max(1, CHUNK_ELEMENTS // vocabulary), labels.shape[0])
    buffer = torch.empty(chunk, vocabulary, dtype=torch.float32, device=labels.device)
    values = torch.empty(labels.shape[0], dtype=torch.float32, device=labels.device)
    for start in range(0, labels.shape[0], chunk):
        at = slice(start, min(start + chunk, labels.shape[0]))
        logits = logits_into(buffer[: at.stop - at.start], hidden[at].float(), head)
        picked = logits.gather(-1, labels[at, None]).squeeze(-1)
        # exp in place: logsumexp would hold a second chunk of logits.
        largest = logits.amax(-1, keepdim=True)
        values[at] = logits.sub_(largest).exp_().sum(-1).log_().add_(largest.squeeze(-1)).sub_(picked)
    return values
