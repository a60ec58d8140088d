"""Negative log-likelihood per token of packed rows, without the logits of a whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.errors import DataError, NonFiniteLoss, UsageError
from xarch_kd.ops.heads import Head
from xarch_kd.ops.streaming.logits import logits_into
from xarch_kd.taps.layout import Layout, layout_of

# Logits held at a time: 256 tokens of a vocabulary of 128 K in float32 are 128 MiB.
CHUNK_ELEMENTS = 32 << 20


@torch.inference_mode()
def token_nll(
    model: PreTrainedModel,
    rows: Tensor,
    *,
    batch_size: int = 4,
    chunk_size: int | None = None,
    paths: Mapping[str, str | None] | object | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return the negative log-likelihood of tokens 1 to T-1 of each row given those before it, in nats.

    `rows` is an integer [rows, T] without padding; the result is float32 [rows, T-1] on the CPU, entry t for token t+1.
    `batch_size` rows go through the model at a time, in evaluation mode; their logits, float32, exist for `chunk_size`
    tokens at a time. `progress` is called with the number of tokens read after each batch.

    Raises:
        DataError: rows that are empty, too short, or hold a token outside the model's vocabulary.
        NonFiniteLoss: a likelihood is NaN or infinite.
    """
    layout = layout_of(model, paths)
    _check_rows(rows, layout.head_weight.shape[0])
    if batch_size < 1 or (chunk_size is not None and chunk_size < 1):
        raise UsageError(
            "batch_size and chunk_size must be positive.", found=f"{batch_size}, {chunk_size}", allowed=">= 1"
        )
    training = model.training
    model.eval()
    try:
        parts = []
        for start in range(0, rows.shape[0], batch_size):
            parts.append(_batch_nll(layout, rows[start : start + batch_size], chunk_size))
            if progress is not None:
                progress(rows[: start + batch_size].numel())
    finally:
        model.train(training)
    values = torch.cat(parts)
    if not bool(torch.isfinite(values).all()):
        row, token = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise NonFiniteLoss(
            f"The likelihood of a token under {type(model).__name__} is not finite.",
            found=f"row {row}, token {token + 1}",
        )
    return values


def perplexity(nll: float) -> float:
    """Return exp(nll), or infinity if that overflows."""
    return math.exp(nll) if nll < math.log(torch.finfo(torch.float64).max) else math.inf


def position_buckets(length: int) -> tuple[tuple[int, int], ...]:
    """Return half-open ranges of tokens of context that double: (1, 2), (2, 4), (4, 8) … up to `length`."""
    starts = [1 << power for power in range(length.bit_length())]
    return tuple((start, min(2 * start, length + 1)) for start in starts)


def position_curve(nll: Tensor) -> tuple[float, ...]:
    """Return the mean NLL in each of `position_buckets`, from [rows, T-1] as `token_nll` returns it, in nats."""
    wide = nll.double()
    return tuple(float(wide[:, start - 1 : stop - 1].mean()) for start, stop in position_buckets(nll.shape[1]))


def _check_rows(rows: Tensor, vocabulary: int) -> None:
    if rows.dim() != 2 or rows.dtype.is_floating_point or rows.dtype == torch.bool:
        raise DataError(
            "Evaluation takes packed rows of tokens.",
            found=f"{list(rows.shape)} {rows.dtype}",
            allowed="an integer tensor [rows, tokens]",
        )
    if rows.shape[0] < 1 or rows.shape[1] < 2:
        raise DataError(
            "There is too little text to evaluate.", found=list(rows.shape), allowed="at least one row of two tokens"
        )
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise DataError(
            "A token is outside the model's vocabulary.",
            found=low if low < 0 else high,
            allowed=f"0 to {vocabulary - 1}",
            fix="tokenize the text with this model's tokenizer",
        )


def _batch_nll(layout: Layout, rows: Tensor, chunk_size: int | None) -> Tensor:
    weight = layout.head_weight
    rows = rows.to(weight.device)
    hidden = layout.base(input_ids=rows, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head = Head(weight, layout.head_bias, layout.logit_scale, layout.logit_softcap)
    values = streamed_nll(hidden, head, rows[:, 1:].flatten().long(), chunk_size)
    return values.view(rows.shape[0], -1).cpu()


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
