"""Rows of equal length packed from documents, and the source that draws a stage's batches from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.batches import Batch
from xarch_kd.data.corpus import Corpus
from xarch_kd.errors import CheckpointError, DataError


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    most: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Return the corpus as token rows `[rows, length]` (int64).

    Documents are joined by the end-of-text token, and tokens after the last full row are dropped.

    `most` bounds the number of rows; `progress` is called with the number of documents that are tokenized. Raises
    `DataError` when the corpus is shorter than one row.
    """
    end = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
    tokens: list[int] = []
    for number, document in enumerate(corpus.documents, start=1):
        # verbose=False: a document longer than the model's context is expected here, since rows are cut afterwards.
        tokens.extend(cast(list[int], tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]))
        tokens.extend(end)
        if progress is not None:
            progress(number)
        if most is not None and len(tokens) >= most * length:
            break
    rows = len(tokens) // length
    if most is not None:
        rows = min(rows, most)
    if rows == 0:
        raise DataError(
            f"the text '{corpus.name}' is too short for one row",
            asked=f"rows of {length} tokens",
            found=f"{len(tokens)} tokens in {len(corpus.documents)} documents",
            fix="give more text, or a smaller data.sequence_length",
        )
    return torch.tensor(tokens[: rows * length], dtype=torch.int64).view(rows, length)


def select_rows(rows: torch.Tensor, count: int, *, seed: int, from_end: bool = False) -> torch.Tensor:
    """Return `count` rows, or all if there are fewer, in the order that the seed gives.

    The last rows of that order with `from_end`: with enough text they are other rows than the first ones.
    """
    order = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))
    return rows[order[-count:] if from_end else order[:count]]


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Rows of each micro-batch of a stage, a pure function of (seed, stage, index).

    The stage draws `distinct` batches of `batch_size` rows from endlessly reshuffled rows; pass 0 goes over them in
    order and each later pass in a new order.
    """

    rows: int
    batch_size: int
    distinct: int
    seed: int
    stage: int

    def batch(self, index: int) -> int:
        """Return the number (0 to `distinct` - 1) of the batch that micro-batch `index` of the stage uses."""
        turn, place = divmod(index, self.distinct)
        return place if turn == 0 else _permutation(self.distinct, (self.seed, self.stage, 1, turn))[place]

    def row(self, batch: int, place: int) -> int:
        """Return the row at `place` of batch `batch`."""
        epoch, position = divmod(batch * self.batch_size + place, self.rows)
        return _permutation(self.rows, (self.seed, self.stage, 0, epoch))[position]


@lru_cache(maxsize=8)
def _permutation(count: int, key: tuple[int, ...]) -> Sequence[int]:
    mixed = 0
    for part in key:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63)
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed)).tolist()


class StageRows:
    """Batch source of a stage: rows [rows, time] of token ids in the order of `order`.

    Its state is the number of micro-batches drawn, with the order and a hash of the rows to recognize them by.
    """

    def __init__(self, rows: Tensor, order: BatchOrder) -> None:
        self.rows = rows
        self.order = order
        self.drawn = 0

    def draw(self) -> Batch:
        """Return the next micro-batch of the stage."""
        number = self.order.batch(self.drawn)
        self.drawn += 1
        rows = [self.order.row(number, place) for place in range(self.order.batch_size)]
        return Batch(input_ids=torch.stack([self.rows[row] for row in rows]), origin=f"batch {number}")

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"drawn": self.drawn, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the micro-batches that `state` counts. Raises CheckpointError for other rows or another order."""
        for name, own in self._identity.items():
            if state.get(name) != own:
                raise CheckpointError(
                    "the checkpoint was trained on other batches than this stage draws",
                    asked=f"{name} {own}",
                    found=state.get(name),
                    fix="restore the text, the tokenizer and the mapping file of the run, or give another --output",
                )
        self.drawn = int(state["drawn"])

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {"order": asdict(self.order), "rows_sha256": hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()}
