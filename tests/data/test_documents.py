"""Documents as token ids: views, selections, hashes, and messages for bad input."""

from __future__ import annotations

import numpy
import pytest

from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.errors import UsageError


def test_documents_are_views_of_one_array() -> None:
    documents = TokenizedDocuments.of([[5, 6, 7], [8, 9]], [[False, True, True], [True, False]])
    assert documents.lengths.tolist() == [3, 2] and documents.tokens == 5 and len(documents) == 2
    assert [documents.ids(number).tolist() for number in (0, 1)] == [[5, 6, 7], [8, 9]]
    assert numpy.shares_memory(documents.ids(1), documents.flat_ids)
    counted = documents.counted(1)
    assert counted is not None and counted.tolist() == [True, False]
    assert TokenizedDocuments.of([[1]]).counted(0) is None


def test_a_selection_holds_the_same_documents_in_its_own_order() -> None:
    documents = TokenizedDocuments.of([[5, 6, 7], [8, 9], [4]])
    chosen = documents.select([2, 0])
    assert [chosen.ids(number).tolist() for number in (0, 1)] == [[4], [5, 6, 7]]
    assert chosen.hashes.tolist() == documents.hashes[[2, 0]].tolist()
    prints = {documents.fingerprint, chosen.fingerprint, documents.select([0, 2]).fingerprint}
    assert len(prints) == 3 and chosen.fingerprint == documents.select(numpy.array([2, 0])).fingerprint


def test_fingerprints_differ_with_order_borders_and_labels() -> None:
    variants = [
        TokenizedDocuments.of([[1, 2], [3]]),
        TokenizedDocuments.of([[1], [2, 3]]),
        TokenizedDocuments.of([[3], [1, 2]]),
        TokenizedDocuments.of([[1, 2], [3]], [[True, True], [True]]),
        TokenizedDocuments.of([[1, 2], [3]], [[True, False], [True]]),
    ]
    assert len({documents.fingerprint for documents in variants}) == len(variants)


@pytest.mark.parametrize(
    ("ids", "counted", "message"),
    [
        ([[1], []], None, "at least one token"),
        ([], None, "at least one token"),
        ([[1, -1]], None, "token ids do not fit"),
        ([[1, 2]], [[True]], "counted does not fit"),
    ],
)
def test_documents_that_cannot_be_are_refused(
    ids: list[list[int]], counted: list[list[bool]] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        TokenizedDocuments.of(ids, counted)
