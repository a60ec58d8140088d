"""Packing documents into rows of equal length, and the order in which a stage draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.corpus import Corpus
from xarch_kd.errors import DataError


def pack(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, *, most: int | None = None) -> torch.Tensor:
    """Return the corpus as token rows `[rows, length]` (int64).

    Documents are joined by the end-of-text token, and what is left after the last whole row is dropped.

    `most` bounds the number of rows. Raises `DataError` when the corpus is shorter than one row.
    """
    end = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
    tokens: list[int] = []
    for document in corpus.documents:
        # verbose=False: a document longer than the model's context is expected here, since rows are cut afterwards.
        tokens.extend(cast(list[int], tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]))
        tokens.extend(end)
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


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Which rows make up each micro-batch of a stage: a pure function of (seed, stage, index), so a resumed run needs
    no sampler state.

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


class StageRows(Dataset[dict[str, torch.Tensor]]):
    """The rows of a stage in the exact order of training: item `i` belongs to micro-batch `i // batch_size`."""

    def __init__(self, rows: torch.Tensor, order: BatchOrder, micro_batches: int) -> None:
        self.rows = rows
        self.order = order
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return self.micro_batches * self.order.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        micro_batch, place = divmod(index, self.order.batch_size)
        batch = self.order.batch(micro_batch)
        return {"input_ids": self.rows[self.order.row(batch, place)], "batch": torch.tensor(batch)}


def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return one micro-batch: `input_ids` [rows, time] and the scalar `batch`, the number of the distinct batch."""
    return {"input_ids": torch.stack([item["input_ids"] for item in items]), "batch": items[0]["batch"]}
