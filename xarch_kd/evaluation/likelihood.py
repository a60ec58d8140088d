"""Negative log-likelihood per token of rows, without the logits of a whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.data.batches import Batch
from xarch_kd.errors import DataError, NonFiniteLoss, UsageError
from xarch_kd.ops.heads import Head
from xarch_kd.ops.streaming.nll import streamed_nll
from xarch_kd.taps.layout import Layout, layout_of, run_base

ModelPaths = Mapping[str, str | None] | object | None


@torch.inference_mode()
def token_nll(
    model: PreTrainedModel,
    rows: Tensor | Sequence[Batch],
    *,
    batch_size: int = 4,
    chunk_size: int | None = None,
    paths: ModelPaths = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return the negative log-likelihood of tokens 1 to T-1 of each row given those before it, in nats.

    `rows` is an integer [rows, T] without padding, of which `batch_size` rows go through the model at a time, or a
    sequence of batches. The result is float32 [rows, T-1] on the CPU, entry t for token t+1, and NaN for tokens that
    are padding or that the labels leave out; documents that a row isolates are rows of their own. The model is in
    evaluation mode, and its logits, float32, exist for `chunk_size` tokens at a time. `progress` is called with the
    number of tokens read after each batch.

    Raises:
        DataError: rows that are empty, too short, or hold a token outside the model's vocabulary, or that have no
            token to predict.
        NonFiniteLoss: a likelihood is NaN or infinite.
    """
    layout = layout_of(model, paths)
    if batch_size < 1 or (chunk_size is not None and chunk_size < 1):
        raise UsageError(
            "batch_size and chunk_size must be positive.", found=f"{batch_size}, {chunk_size}", allowed=">= 1"
        )
    batches = batches_of(rows, batch_size)
    _check_batches(batches, layout.head_weight.shape[0])
    training = model.training
    model.eval()
    try:
        parts, read = [], 0
        for batch in batches:
            parts += [_batch_nll(layout, part, chunk_size, len(parts)) for part in batch.apart()]
            read += batch.tokens
            if progress is not None:
                progress(read)
    finally:
        model.train(training)
    time = max(part.shape[1] for part in parts)
    padded = [torch.nn.functional.pad(part, (0, time - part.shape[1]), value=math.nan) for part in parts]
    return torch.cat(padded)


def batches_of(rows: Tensor | Sequence[Batch], batch_size: int) -> Sequence[Batch]:
    """Return packed rows of tokens [rows, T] as batches; batches are returned as they are. Raises DataError."""
    if not isinstance(rows, Tensor):
        return rows
    if rows.dim() != 2 or rows.dtype.is_floating_point or rows.dtype == torch.bool:
        raise DataError(
            "Evaluation takes packed rows of tokens.",
            found=f"{list(rows.shape)} {rows.dtype}",
            allowed="an integer tensor [rows, tokens], or batches",
        )
    if rows.shape[0] < 1 or rows.shape[1] < 2:
        raise DataError(
            "There is too little text to evaluate.", found=list(rows.shape), allowed="at least one row of two tokens"
        )
    return [Batch(input_ids=part.long(), origin="evaluation text") for part in rows.split(batch_size)]


def perplexity(nll: float) -> float:
    """Return exp(nll), or infinity if that overflows."""
    return math.exp(nll) if nll < math.log(torch.finfo(torch.float64).max) else math.inf


def position_buckets(length: int) -> tuple[tuple[int, int], ...]:
    """Return half-open ranges of tokens of context that double: (1, 2), (2, 4), (4, 8) … up to `length`."""
    starts = [1 << power for power in range(length.bit_length())]
    return tuple((start, min(2 * start, length + 1)) for start in starts)


def position_curve(nll: Tensor) -> tuple[float, ...]:
    """Return the mean NLL in each of `position_buckets`, from [rows, T-1] as `token_nll` returns it, in nats.

    It is NaN for a bucket without a token.
    """
    wide = nll.double()
    return tuple(float(wide[:, start - 1 : stop - 1].nanmean()) for start, stop in position_buckets(nll.shape[1]))


def _check_batches(batches: Sequence[Batch], vocabulary: int) -> None:
    low = min((int(batch.input_ids.min()) for batch in batches), default=0)
    high = max((int(batch.input_ids.max()) for batch in batches), default=0)
    if low < 0 or high >= vocabulary:
        raise DataError(
            "A token is outside the model's vocabulary.",
            found=low if low < 0 else high,
            allowed=f"0 to {vocabulary - 1}",
            fix="tokenize the text with this model's tokenizer",
        )
    if not any(batch.predictions for batch in batches):
        raise DataError(
            "There is too little text to evaluate.",
            found=f"{sum(batch.tokens for batch in batches)} tokens, none of which is to be predicted",
            allowed="at least one row of two tokens, the second of which counts",
        )


def _batch_nll(layout: Layout, batch: Batch, chunk_size: int | None, number: int) -> Tensor:
    """Return the likelihoods [rows, time - 1] of a batch on the CPU, NaN where a token does not count."""
    weight = layout.head_weight
    batch = batch.to(weight.device)
    hidden = run_base(layout, batch.input_ids, batch.model_mask, batch.position_ids).flatten(0, 1)
    head = Head(weight, layout.head_bias, layout.logit_scale, layout.logit_softcap)
    labels = batch.next_tokens.flatten()
    found = torch.full(labels.shape, math.nan)
    at = slice(None) if batch.predicted is None else batch.predicted
    if batch.predictions:
        values = streamed_nll(hidden[at], head, labels[at].long(), chunk_size).cpu()
        if not bool(torch.isfinite(values).all()):
            place = int((~torch.isfinite(values)).nonzero()[0])
            row, token = divmod(int(batch.predicted[place]) if batch.predicted is not None else place, batch.time)
            raise NonFiniteLoss(
                f"The likelihood of a token under {type(layout.model).__name__} is not finite.",
                found=f"row {row}, token {token + 1} of batch {number} ({batch.origin})",
            )
        found[at if isinstance(at, slice) else at.cpu()] = values
    return found.view(batch.input_ids.shape)[:, :-1]
