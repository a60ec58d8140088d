"""Rows of tokens packed from documents: cut across documents, documents kept whole, or one document per row."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

import numpy
import torch

from xarch_kd.data.batches import Batch
from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.errors import DataError, UsageError
from xarch_kd.losses.tokens import IGNORED_LABEL

Packing = Literal["wrapped", "best_fit", "none"]

# Any token id: padding is masked everywhere.
PADDING_ID: Final = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One row: token `ids` [length], which of them are to be predicted, and positions inside isolated documents.

    `counted` [length] is boolean, None for all; `positions` [length] is None where documents are joined.
    """

    ids: numpy.ndarray
    counted: numpy.ndarray | None
    positions: numpy.ndarray | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pieces:
    """Pieces of documents, in the order of rows: piece p is `lengths[p]` tokens of `documents[p]` from `starts[p]`.

    Row r has pieces `rows[r]` to `rows[r + 1]`.
    """

    documents: numpy.ndarray
    starts: numpy.ndarray
    lengths: numpy.ndarray
    rows: numpy.ndarray


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PackedRows:
    """Rows of at most `sequence_length` tokens of `documents`, read from their store when a batch is asked for.

    Memory holds 8 bytes per document, and 24 more where no document is cut across rows. `tokens` counts the tokens of
    all rows; `cut` counts the documents of which a rest is left out because a row holds one document (`packing: none`),
    and `unlabelled` those of them without a token to predict in what is kept.
    """

    documents: TokenizedDocuments
    sequence_length: int
    packing: Packing
    isolated: bool
    tokens: int
    cut: int = 0
    unlabelled: int = 0
    _ends: numpy.ndarray | None = field(default=None)
    _pieces: _Pieces | None = field(default=None)

    def __repr__(self) -> str:
        return (
            f"PackedRows({len(self):,} rows of {self.sequence_length} tokens, {self.packing}, {self.waste:.2%} waste)"
        )

    def __len__(self) -> int:
        if self._pieces is not None:
            return len(self._pieces.rows) - 1
        return self.tokens // self.sequence_length

    @property
    def description(self) -> str:
        """One line for tables."""
        return self.documents.description

    @property
    def name(self) -> str:
        """Short name for messages and tables."""
        return self.documents.name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows in order: of the documents, and of the way they are packed."""
        how = f"{self.packing} {self.sequence_length} {self.isolated}"
        return hashlib.sha256(f"{self.documents.fingerprint} {how}".encode()).hexdigest()

    @property
    def lengths(self) -> numpy.ndarray | None:
        """Tokens of each row [rows] where batches are drawn by length, as rows hold one document each; else None."""
        return self._pieces.lengths if self.packing == "none" and self._pieces is not None else None

    @property
    def waste(self) -> float:
        """Share of the positions of all rows, each as long as `sequence_length`, that are padding."""
        return 1 - self.tokens / (len(self) * self.sequence_length)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each source, of which there is one."""
        return (len(self),)

    @property
    def weights(self) -> tuple[float, ...]:
        """Share of each source."""
        return (1.0,)

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines about what packing left out."""
        if not self.cut:
            return ()
        left_out = self.documents.tokens - self.tokens
        lost = f"; {self.unlabelled:,} of them have no token to predict before that" if self.unlabelled else ""
        return (
            f"{self.cut:,} of {len(self):,} documents of {self.name} are longer than {self.sequence_length} tokens and "
            f"are cut there: {left_out:,} of {self.documents.tokens:,} tokens are left out{lost} (packing: "
            "best_fit keeps all)",
        )

    def row(self, row: int) -> Row:
        """Return one row."""
        parts = [
            (self.documents.ids(document)[start:stop], document, start, stop)
            for document, start, stop in self._pieces_of(int(row))
        ]
        counted = None
        if self.documents.has_labels:
            found = [_counted(self.documents, document)[start:stop] for _, document, start, stop in parts]
            counted = numpy.concatenate(found)
        positions = numpy.concatenate([numpy.arange(len(ids)) for ids, *_ in parts]) if self.isolated else None
        ids = numpy.concatenate([ids for ids, *_ in parts]).astype(numpy.int64)
        return Row(ids=ids, counted=counted, positions=positions)

    def batch(self, rows: Sequence[int], *, origin: str) -> Batch:
        """Return rows as a batch, padded on the right to the longest of them."""
        return collated([self.row(row) for row in rows], origin=origin)

    def hashes(self, rows: Sequence[int]) -> set[int]:
        """Return the hashes of the documents that rows have a part of."""
        documents = {document for row in rows for document, _, _ in self._pieces_of(int(row))}
        return {int(self.documents.hashes[document]) for document in documents}

    def _pieces_of(self, row: int) -> list[tuple[int, int, int]]:
        """Return (document, start, stop) of each piece of a row."""
        if self._pieces is not None:
            pieces = self._pieces
            return [
                (int(pieces.documents[at]), int(pieces.starts[at]), int(pieces.starts[at] + pieces.lengths[at]))
                for at in range(int(pieces.rows[row]), int(pieces.rows[row + 1]))
            ]
        assert self._ends is not None
        first, last = row * self.sequence_length, (row + 1) * self.sequence_length
        found = []
        document = int(numpy.searchsorted(self._ends, first, side="right"))
        while first < last:
            end = int(self._ends[document])
            begin = end - int(self.documents.lengths[document])
            stop = min(end, last)
            found.append((document, first - begin, stop - begin))
            first, document = stop, document + 1
        return found


def pack(
    documents: TokenizedDocuments, sequence_length: int, *, packing: Packing = "wrapped", isolated: bool = False
) -> PackedRows:
    """Return rows of at most `sequence_length` tokens of `documents`, in their order.

    `wrapped` joins all documents and cuts every `sequence_length` tokens, without the last, incomplete row. `best_fit`
    cuts no document that fits a row: longer ones are cut into full rows and a rest, and what is shorter than a row is
    put together by best-fit decreasing. `none` gives each document a row of its own and leaves out what is longer.
    With `isolated`, positions begin again at 0 in each document of a row.

    Raises DataError for too little text for one row, UsageError for an unknown packing.

    >>> from xarch_kd.data.documents import TokenizedDocuments
    >>> documents = TokenizedDocuments.of([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]])
    >>> [pack(documents, 5, packing=packing).row(1).ids.tolist() for packing in ("wrapped", "best_fit", "none")]
    [[6, 7, 8, 9, 10], [6, 7, 8, 9, 10], [6, 7]]
    """
    if packing not in get_args(Packing):
        raise UsageError("unknown packing", asked=packing, allowed=" | ".join(get_args(Packing)))
    if packing == "wrapped":
        ends = numpy.cumsum(documents.lengths)
        rows = int(ends[-1]) // sequence_length if len(ends) else 0
        _require_rows(documents, rows, sequence_length)
        tokens = rows * sequence_length
        return PackedRows(
            documents=documents,
            sequence_length=sequence_length,
            packing=packing,
            isolated=isolated,
            tokens=tokens,
            _ends=ends,
        )
    pieces = _single(documents, sequence_length) if packing == "none" else _best_fit(documents, sequence_length)
    _require_rows(documents, len(pieces.rows) - 1, sequence_length)
    cut = (documents.lengths > sequence_length).nonzero()[0] if packing == "none" else numpy.empty(0, dtype=numpy.int64)
    unlabelled = 0
    if documents.has_labels:
        unlabelled = sum(not _counted(documents, int(document))[:sequence_length].any() for document in cut)
    if len(cut) == len(documents) == unlabelled:
        raise DataError(
            f"no token of '{documents.name}' is to be predicted in the first {sequence_length} tokens of its documents",
            found=f"{len(cut):,} documents, all longer than a row",
            fix="packing: best_fit, which keeps the rest of long documents, or a larger data.sequence_length",
        )
    return PackedRows(
        documents=documents,
        sequence_length=sequence_length,
        packing=packing,
        isolated=isolated,
        tokens=int(pieces.lengths.sum()),
        cut=len(cut),
        unlabelled=unlabelled,
        _pieces=pieces,
    )


def collated(rows: Sequence[Row], *, origin: str) -> Batch:
    """Return rows as one batch, padded on the right to the longest of them.

    Labels are there if any row leaves out tokens, positions if any row isolates documents.
    """
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids = numpy.full(shape, PADDING_ID, dtype=numpy.int64)
    labels = numpy.full(shape, IGNORED_LABEL, dtype=numpy.int64)
    # Padding is a document of its own.
    positions = numpy.zeros(shape, dtype=numpy.int64)
    mask = numpy.zeros(shape, dtype=bool)
    for at, row in enumerate(rows):
        length = len(row.ids)
        ids[at, :length] = row.ids
        labels[at, :length] = row.ids if row.counted is None else numpy.where(row.counted, row.ids, IGNORED_LABEL)
        positions[at, :length] = numpy.arange(length) if row.positions is None else row.positions
        positions[at, length:] = numpy.arange(shape[1] - length)
        mask[at, :length] = True
    has_labels = any(row.counted is not None for row in rows)
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=None if mask.all() else torch.from_numpy(mask),
        labels=torch.from_numpy(labels) if has_labels else None,
        position_ids=torch.from_numpy(positions) if any(row.positions is not None for row in rows) else None,
        origin=origin,
    )


def _counted(documents: TokenizedDocuments, document: int) -> numpy.ndarray:
    counted = documents.counted(document)
    assert counted is not None
    return counted


def _require_rows(documents: TokenizedDocuments, rows: int, sequence_length: int) -> None:
    if rows == 0:
        raise DataError(
            f"the text '{documents.name}' is too short for one row",
            asked=f"rows of {sequence_length} tokens",
            found=f"{documents.tokens} tokens in {len(documents)} documents",
            fix="give more text, or a smaller data.sequence_length",
        )


def _single(documents: TokenizedDocuments, sequence_length: int) -> _Pieces:
    number = len(documents)
    return _Pieces(
        documents=numpy.arange(number),
        starts=numpy.zeros(number, dtype=numpy.int64),
        lengths=numpy.minimum(documents.lengths, sequence_length),
        rows=numpy.arange(number + 1),
    )


def _best_fit(documents: TokenizedDocuments, sequence_length: int) -> _Pieces:
    """Return full rows of long documents first, then the rows that hold several pieces."""
    full, rest = numpy.divmod(documents.lengths, sequence_length)
    full_documents = numpy.repeat(numpy.arange(len(documents)), full)
    first = numpy.repeat(numpy.cumsum(full) - full, full)
    full_starts = (numpy.arange(len(full_documents)) - first) * sequence_length
    short = rest.nonzero()[0]
    bins = best_fit_decreasing(rest[short], sequence_length)
    order = numpy.argsort(bins, kind="stable")
    short, bins = short[order], bins[order]
    sizes = numpy.concatenate((numpy.ones(len(full_documents), dtype=numpy.int64), numpy.bincount(bins)))
    return _Pieces(
        documents=numpy.concatenate((full_documents, short)),
        starts=numpy.concatenate((full_starts, (full * sequence_length)[short])),
        lengths=numpy.concatenate((numpy.full(len(full_documents), sequence_length), rest[short])),
        rows=numpy.concatenate(([0], numpy.cumsum(sizes))),
    )


def best_fit_decreasing(lengths: numpy.ndarray, capacity: int) -> numpy.ndarray:
    """Return the bin [items] of each item by best-fit decreasing: into the fullest bin with room, the longest first.

    `lengths` [items] are 1 to `capacity`. Items of one length are placed at once: those bins are taken in the order of
    their room, which costs one step per pair of a length and a room that meet, at most one per item.

    >>> import numpy
    >>> best_fit_decreasing(numpy.array([4, 7, 3, 6]), 10).tolist()
    [1, 0, 0, 1]
    """
    order = numpy.argsort(-lengths, kind="stable")
    values, counts = numpy.unique(lengths, return_counts=True)
    bins = numpy.empty(len(lengths), dtype=numpy.int64)
    free: dict[int, list[numpy.ndarray]] = {}
    rooms: list[int] = []
    opened = at = 0

    def give_back(room: int, group: numpy.ndarray) -> None:
        if room > 0 and len(group):
            if room not in free:
                insort(rooms, room)
            free.setdefault(room, []).append(group)

    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms.pop(place)
                group = numpy.concatenate(free.pop(room))
            else:
                room = capacity
                group = numpy.arange(opened, opened + -(-count // (capacity // length)))
                opened += len(group)
            each = room // length
            used = group[: -(-count // each)]
            placed = min(count, each * len(used))
            bins[order[at : at + placed]] = numpy.repeat(used, each)[:placed]
            in_last = placed - each * (len(used) - 1)
            give_back(room, group[len(used) :])
            give_back(room - each * length, used[:-1])
            give_back(room - in_last * length, used[-1:])
            at, count = at + placed, count - placed
    return bins
