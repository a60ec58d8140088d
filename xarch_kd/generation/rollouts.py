"""Rollouts: rows of tokens whose beginning is text and whose continuation a model samples."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.data.batches import Batch
from xarch_kd.generation.sampling import Sampling, sample
from xarch_kd.losses.tokens import IGNORED_LABEL

# Length of the runs of tokens whose repetition is counted.
RUN = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One row of tokens on the CPU: `ids` [time], int64, and `counts` [time], true where a token is to be predicted."""

    ids: Tensor
    counts: Tensor


@dataclass(frozen=True, kw_only=True)
class RolloutFigures:
    """Sums over continuations: their number, their tokens, how many ended, runs of four tokens, seconds to sample them.

    `distinct` counts the distinct runs of each continuation. The sum of figures is that of all their continuations.

    >>> figures = RolloutFigures(rows=2, tokens=10, ended=1, runs=4, distinct=3, seconds=0.5)
    >>> (figures + figures).mean_length, figures.distinct_4, figures.tokens_per_second
    (5.0, 0.75, 20.0)
    """

    rows: float = 0.0
    tokens: float = 0.0
    ended: float = 0.0
    runs: float = 0.0
    distinct: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: RolloutFigures) -> RolloutFigures:
        return RolloutFigures.of([own + more for own, more in zip(self.values(), other.values(), strict=True)])

    @classmethod
    def of(cls, values: Sequence[float]) -> RolloutFigures:
        """Return figures of `values`, in the order of the fields."""
        return cls(**dict(zip((field.name for field in fields(cls)), values, strict=True)))

    def values(self) -> list[float]:
        """Return the values of the fields in order."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def mean_length(self) -> float:
        """Tokens per continuation."""
        return self.tokens / self.rows if self.rows else 0.0

    @property
    def ended_share(self) -> float:
        """Share of the continuations that ended before their limit."""
        return self.ended / self.rows if self.rows else 0.0

    @property
    def distinct_4(self) -> float:
        """Share of the runs of four tokens that are distinct within their continuation; 1 without such runs."""
        return self.distinct / self.runs if self.runs else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens sampled per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def prompts_of(batch: Batch, prompt_tokens: int) -> list[Row]:
    """Return the beginning of each row of a batch, which a model continues.

    It is what comes before the first token with a label; of a row that begins with one, its first `prompt_tokens`
    tokens, inside its first document. The last token of a row is never part of it, unless it is the only one. Rows
    without a token have an empty prompt.
    """
    ids, mask = batch.input_ids.cpu().long(), batch.attention_mask
    lengths = [batch.time] * len(ids) if mask is None else mask.sum(1).tolist()
    labels = None if batch.labels is None else batch.labels.cpu() != IGNORED_LABEL
    positions = None if batch.position_ids is None else batch.position_ids.cpu()
    prompts = []
    for row, length in enumerate(lengths):
        if positions is not None:
            starts = (positions[row, 1:length] == 0).nonzero().flatten()
            length = int(starts[0]) + 1 if len(starts) else length
        counts = torch.ones(length, dtype=torch.bool) if labels is None else labels[row, :length]
        first = int(counts.nonzero()[0]) if counts.any() else length
        stop = first if labels is not None and first else prompt_tokens
        stop = min(stop, max(length - 1, 1), length)
        prompts.append(Row(ids=ids[row, :stop], counts=counts[:stop].clone()))
    return prompts


def roll_out(
    model: PreTrainedModel,
    prompts: Sequence[Row],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    end_of_sequence: Sequence[int],
    vocabulary: int | None = None,
) -> tuple[list[Row], RolloutFigures]:
    """Return each prompt with the tokens that the model samples after it, which all count, and figures of these.

    Prompts of equal length are one batch, all prompts where the model ignores padding (`sample`). A row without a token
    stays without. Raises what `sample` raises.
    """
    began = time.perf_counter()
    given = [place for place, prompt in enumerate(prompts) if len(prompt.ids)]
    if not given:
        return list(prompts), RolloutFigures()
    samples = sample(
        model,
        [prompts[place].ids for place in given],
        sampling,
        seed=[seeds[place] for place in given],
        end_of_sequence=end_of_sequence,
        vocabulary=vocabulary,
    )
    continuations = samples.completions()
    rows = list(prompts)
    for place, tokens in zip(given, continuations, strict=True):
        prompt = prompts[place]
        rows[place] = Row(
            ids=torch.cat((prompt.ids, torch.tensor(tokens, dtype=torch.long))),
            counts=torch.cat((prompt.counts, torch.ones(len(tokens), dtype=torch.bool))),
        )
    runs = [list(zip(*(tokens[at:] for at in range(RUN)), strict=False)) for tokens in continuations]
    figures = RolloutFigures(
        rows=len(given),
        tokens=sum(map(len, continuations)),
        ended=int(samples.ended.sum()),
        runs=sum(map(len, runs)),
        distinct=sum(len(set(found)) for found in runs),
        seconds=time.perf_counter() - began,
    )
    return rows, figures


def batch_of(rows: Sequence[Row], *, origin: str) -> Batch:
    """Return rows as a batch, padded on the right, with labels where some token is not to be predicted.

    A row counts the same tokens as the same row of a text.

    >>> row = Row(ids=torch.tensor([5, 6, 7]), counts=torch.tensor([False, True, True]))
    >>> batch_of([row], origin="an example")
    Batch(1 x 3 tokens, 3 count, 2 are predicted, from an example)
    """
    time_steps = max(1, *(len(row.ids) for row in rows))
    ids = torch.zeros(len(rows), time_steps, dtype=torch.long)
    mask, counts = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)], counts[place, : len(row.ids)] = row.ids, row.counts
        mask[place, : len(row.ids)] = True
    is_labelled = not torch.equal(counts, mask)
    labels = ids.masked_fill(~counts, IGNORED_LABEL) if is_labelled else None
    return Batch(input_ids=ids, attention_mask=mask, labels=labels, origin=origin)


def seed_of(*key: int) -> int:
    """Return a seed of 63 bits that follows from a key of integers."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
