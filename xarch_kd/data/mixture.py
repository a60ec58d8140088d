"""Rows of several sources, drawn by weight."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy

from xarch_kd.data.batches import Batch
from xarch_kd.data.packing import PackedRows, collated
from xarch_kd.errors import UsageError


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedRows:
    """Rows of `parts`, one after another, of which batches have `weights` (any positive numbers) as shares.

    Each part is drawn without repetition, and again in another order once all of its rows were drawn.

    Raises UsageError for a weight that is not positive and for parts of different sequence lengths.

    >>> from xarch_kd.data.documents import TokenizedDocuments
    >>> from xarch_kd.data.packing import pack
    >>> parts = tuple(pack(TokenizedDocuments.of([[number] * 64]), 8) for number in (1, 2))
    >>> rows = MixedRows(parts=parts, weights=(0.7, 0.3))
    >>> len(rows), rows.batch([0, 8], origin="an example").input_ids[:, 0].tolist()
    (16, [1, 2])
    """

    parts: tuple[PackedRows, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        for part, weight in zip(self.parts, self.weights, strict=True):
            if not 0 < weight < float("inf"):
                raise UsageError(
                    f"the source '{part.name}' of a mixture would never be drawn",
                    found=f"weight {weight:g}",
                    allowed="weights above 0",
                    fix="give it a positive weight, or leave the source out",
                )
        if len({part.sequence_length for part in self.parts}) != 1:
            raise UsageError("the sources of a mixture need one sequence length")

    @property
    def sequence_length(self) -> int:
        """Most tokens of a row."""
        return self.parts[0].sequence_length

    @property
    def name(self) -> str:
        """Short name for messages and tables."""
        return " + ".join(part.name for part in self.parts)

    @property
    def description(self) -> str:
        """One line for tables: each source with its share."""
        total = sum(self.weights)
        shares = zip(self.parts, self.weights, strict=True)
        return "mixture of " + ", ".join(f"{weight / total:.0%} {part.description}" for part, weight in shares)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows in order, and of the weights."""
        parts = [f"{part.fingerprint} {weight}" for part, weight in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows."""
        return sum(part.tokens for part in self.parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each source."""
        return tuple(len(part) for part in self.parts)

    @property
    def lengths(self) -> numpy.ndarray | None:
        """Tokens of each row [rows] where batches are drawn by length, else None."""
        own = [part.lengths for part in self.parts]
        return None if any(part is None for part in own) else numpy.concatenate(own)  # type: ignore[arg-type]

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines about what packing left out of each source."""
        return tuple(notice for part in self.parts for notice in part.notices)

    def __len__(self) -> int:
        return sum(self.sizes)

    def batch(self, rows: Sequence[int], *, origin: str) -> Batch:
        """Return rows as a batch, padded on the right to the longest of them."""
        return collated([part.row(row) for part, row in self._placed(rows)], origin=origin)

    def hashes(self, rows: Sequence[int]) -> set[int]:
        """Return the hashes of the documents that rows have a part of."""
        return {found for part, row in self._placed(rows) for found in part.hashes([row])}

    def _placed(self, rows: Sequence[int]) -> Iterator[tuple[PackedRows, int]]:
        """Yield the source of each row, and the row's number there."""
        ends = numpy.cumsum(self.sizes)
        for row in rows:
            source = int(numpy.searchsorted(ends, row, side="right"))
            yield self.parts[source], int(row) - int(ends[source]) + len(self.parts[source])
