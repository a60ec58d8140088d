"""Rows of given tokens, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.packing import PackedRows, pack
from xarch_kd.data.rows import Rows, Selection


def rows_from(ids: Tensor) -> PackedRows:
    """Return token ids [rows, time] as rows, each of one document."""
    return pack(TokenizedDocuments.of(ids.tolist()), ids.shape[1])


def selection_from(ids: Tensor) -> Selection:
    """Return all rows of token ids [rows, time]."""
    return Selection(rows=rows_from(ids), chosen=tuple(range(len(ids))))


def ids_of(rows: Rows | Selection) -> Tensor:
    """Return the token ids [rows, time] of rows without padding."""
    chosen = rows if isinstance(rows, Selection) else Selection(rows=rows, chosen=tuple(range(len(rows))))
    if not chosen.chosen:
        return torch.empty(0, chosen.rows.sequence_length, dtype=torch.int64)
    return torch.cat([batch.input_ids for batch in chosen.batches(64, origin="a test")])
