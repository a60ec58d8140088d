"""The held-out split follows the content of each document alone."""

from __future__ import annotations

import pytest

from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.splitting import split_documents


def _sides(documents: TokenizedDocuments, share: float = 0.2, seed: int = 0) -> tuple[set[int], set[int]]:
    parts = split_documents(documents, share, seed=seed)
    training, held = (
        set() if part is None else {int(part.ids(number)[0]) for number in range(len(part))} for part in parts
    )
    return training, held


def test_no_document_moves_when_documents_are_added_or_reordered() -> None:
    before, after = range(200), [*range(500, 200, -1), *range(200)]
    training, held = _sides(TokenizedDocuments.of([[number] for number in before]))
    more_training, more_held = _sides(TokenizedDocuments.of([[number] for number in after]))
    assert training | held == set(before) and not training & held
    assert training <= more_training and held <= more_held
    assert 20 < len(held) < 60


def test_equal_documents_are_on_one_side_and_the_seed_changes_the_split() -> None:
    documents = TokenizedDocuments.of([[number % 20] for number in range(100)])
    training, held = _sides(documents)
    assert training | held == set(range(20)) and not training & held
    assert held != _sides(documents, seed=1)[1]


def test_small_corpora_have_both_sides() -> None:
    for number in range(2, 8):
        for seed in range(10):
            for share in (0.01, 0.99):
                training, held = _sides(TokenizedDocuments.of([[id] for id in range(number)]), share, seed)
                assert training and held and len(training | held) == number


def test_one_document_is_cut_in_two() -> None:
    training, held = split_documents(TokenizedDocuments.of([list(range(100))]), 0.1, seed=0)
    assert held is not None
    assert training.ids(0).tolist() == list(range(90)) and held.ids(0).tolist() == list(range(90, 100))
    assert training.fingerprint != held.fingerprint
    assert training.description.startswith("training part of")


@pytest.mark.parametrize(("ids", "share"), [([[1, 2]] * 100, 0.1), ([[1], [2], [3]], 0.0), ([[1]], 0.1)])
def test_nothing_is_held_out_of_copies_or_when_it_is_not_wanted(ids: list[list[int]], share: float) -> None:
    training, held = split_documents(TokenizedDocuments.of(ids), share, seed=0)
    assert held is None and len(training) == len(ids)
