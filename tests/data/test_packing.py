"""Packing: what each way keeps, cuts and pads, against the documents themselves."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.packing import PackedRows, Packing, best_fit_decreasing, pack
from xarch_kd.errors import DataError, UsageError


def _documents(*lengths: int, labels: bool = False) -> TokenizedDocuments:
    """Return documents whose ids are all different, so that a row shows where each token came from."""
    starts = numpy.cumsum([1, *lengths])
    ids = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
    counted = [[index >= length // 2 for index in range(length)] for length in lengths] if labels else None
    return TokenizedDocuments.of(ids, counted)


def _ids(rows: PackedRows) -> list[list[int]]:
    return [rows.row(row).ids.tolist() for row in range(len(rows))]


@pytest.mark.parametrize("lengths", [(5, 1, 30, 7, 2, 9), (100,), (3,) * 20, (16, 16), (15, 1, 17)])
def test_wrapped_rows_are_the_joined_documents_cut_every_t_tokens(lengths: tuple[int, ...]) -> None:
    documents = _documents(*lengths)
    total = sum(lengths)
    expected = torch.arange(1, total + 1)[: total // 8 * 8].view(-1, 8)
    rows = pack(documents, 8)
    assert len(rows) == len(expected) and rows.tokens == expected.numel()
    order = list(reversed(range(len(rows))))
    batch = rows.batch(order, origin="a test")
    assert torch.equal(batch.input_ids, expected[order])
    assert (batch.attention_mask, batch.labels, batch.position_ids) == (None, None, None)


def test_best_fit_cuts_no_document_that_fits() -> None:
    generator = numpy.random.default_rng(0)
    lengths = generator.integers(1, 40, size=200).tolist()
    documents = _documents(*lengths)
    rows = pack(documents, 16, packing="best_fit")
    found = _ids(rows)
    assert sorted(token for row in found for token in row) == list(range(1, sum(lengths) + 1))
    assert max(map(len, found)) == 16 and rows.tokens == sum(lengths)
    where = {token: number for number, row in enumerate(found) for token in row}
    for number, length in enumerate(lengths):
        ids = documents.ids(number).tolist()
        # Full rows of a long document, then its rest, whole.
        pieces = [ids[start : start + 16] for start in range(0, length, 16)]
        for piece in pieces:
            row = found[where[piece[0]]]
            at = row.index(piece[0])
            assert row[at : at + len(piece)] == piece


def _first_principles(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing, one item at a time."""
    rooms: list[int] = []
    bins = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            number = min(fitting)[1]
        else:
            number = len(rooms)
            rooms.append(capacity)
        rooms[number] -= lengths[item]
        bins[item] = number
    return bins


@pytest.mark.parametrize("seed", range(6))
def test_bins_are_those_of_best_fit_decreasing_one_item_at_a_time(seed: int) -> None:
    generator = numpy.random.default_rng(seed)
    capacity = int(generator.integers(8, 60))
    lengths = generator.integers(1, capacity + 1, size=150)
    found = best_fit_decreasing(lengths, capacity)
    loads = numpy.bincount(found, weights=lengths)
    assert loads.max() <= capacity
    expected = _first_principles(lengths.tolist(), capacity)
    # Bins of equal room are interchangeable: how full the bins are is the same.
    assert sorted(loads.tolist()) == sorted(numpy.bincount(expected, weights=lengths).tolist())


def test_best_fit_wastes_little_on_chat_like_lengths() -> None:
    lengths = numpy.random.default_rng(0).lognormal(math.log(250), 1.0, size=20_000).astype(numpy.int64) + 1
    documents = TokenizedDocuments.of([[1]])
    flat = numpy.zeros(int(lengths.sum()), dtype=numpy.uint16)
    documents = documents.__class__(
        name="chat",
        description="chat",
        lengths=lengths,
        hashes=numpy.arange(len(lengths), dtype=numpy.uint64),
        fingerprint="chat",
        flat_ids=flat,
        flat_counted=None,
        starts=numpy.cumsum(lengths) - lengths,
    )
    for sequence_length in (512, 1024, 2048):
        rows = pack(documents, sequence_length, packing="best_fit")
        full, rest = numpy.divmod(lengths, sequence_length)
        # No packing has fewer rows than the tokens fill, or than pieces longer than half a row.
        bound = max(math.ceil(lengths.sum() / sequence_length), int(full.sum() + (rest > sequence_length / 2).sum()))
        assert bound <= len(rows) <= 1.03 * bound
        assert rows.tokens == lengths.sum()
        assert rows.waste < 0.03


def test_one_document_per_row_is_cut_counted_and_padded() -> None:
    rows = pack(_documents(3, 20, 8), 8, packing="none")
    assert [len(ids) for ids in _ids(rows)] == [3, 8, 8]
    assert rows.lengths is not None and rows.lengths.tolist() == [3, 8, 8]
    assert rows.cut == 1 and "12 of 31 tokens are left out" in rows.notices[0]
    batch = rows.batch([0, 1], origin="a test")
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(1).tolist() == [3, 8]
    assert batch.predictions == 2 + 7
    # Rows are as long as the longest of the batch.
    assert rows.batch([0], origin="a test").input_ids.shape == (1, 3)


def test_documents_whose_labels_are_cut_off_are_counted_and_refused_if_they_are_all() -> None:
    lengths = (30, 6, 30)
    counted = [[index >= length - 5 for index in range(length)] for length in lengths]
    documents = TokenizedDocuments.of([[1] * length for length in lengths], counted)
    assert "2 of them have no token to predict" in pack(documents, 8, packing="none").notices[0]
    with pytest.raises(DataError, match=r"no token of 'in memory' is to be predicted[\s\S]*best_fit"):
        pack(documents.select([0, 2]), 8, packing="none")


@pytest.mark.parametrize("packing", ["wrapped", "best_fit", "none"])
def test_labels_follow_their_tokens(packing: Packing) -> None:
    documents = _documents(10, 4, 7, 3, labels=True)
    expected = {
        int(token)
        for number in range(4)
        for token, counts in zip(documents.ids(number), documents.counted(number), strict=True)  # type: ignore[arg-type]
        if counts
    }
    rows = pack(documents, 8, packing=packing)
    batch = rows.batch(range(len(rows)), origin="a test")
    assert batch.labels is not None
    kept = {int(token) for row in range(len(rows)) for token in rows.row(row).ids}
    counts = batch.labels != -100
    assert torch.equal(batch.labels[counts], batch.input_ids[counts])
    assert set(batch.labels[counts].tolist()) == expected & kept


def test_positions_begin_again_in_each_isolated_document() -> None:
    rows = pack(_documents(5, 3, 8, 6), 8, packing="best_fit", isolated=True)
    batch = rows.batch(range(len(rows)), origin="a test")
    assert batch.position_ids is not None
    found = {tuple(positions) for positions in batch.position_ids.tolist()}
    assert found == {(*range(8),), (*range(5), *range(3)), (*range(6), 0, 1)}
    # The first token of a document is not predicted from another document.
    assert batch.predictions == sum(length - 1 for length in (5, 3, 8, 6))
    wrapped = pack(_documents(8, 30), 8, isolated=True).batch([2], origin="a test")
    assert wrapped.position_ids is None  # the middle of one document


def test_the_fingerprint_covers_documents_labels_and_packing() -> None:
    documents = _documents(9, 9)
    rows = [
        pack(documents, 8),
        pack(documents, 9),
        pack(documents, 8, isolated=True),
        pack(documents, 8, packing="best_fit"),
        pack(documents.select([1, 0]), 8),
        pack(_documents(9, 9, labels=True), 8),
    ]
    assert len({part.fingerprint for part in rows}) == len(rows)
    assert pack(_documents(9, 9), 8).fingerprint == rows[0].fingerprint


def test_too_little_text_and_an_unknown_packing_are_refused() -> None:
    with pytest.raises(DataError, match=r"too short for one row[\s\S]*rows of 64 tokens[\s\S]*5 tokens in 2 documents"):
        pack(_documents(2, 3), 64)
    with pytest.raises(UsageError, match=r"unknown packing[\s\S]*wrapped \| best_fit \| none"):
        pack(_documents(2, 3), 64, packing="tight")  # type: ignore[arg-type]
