"""Corpora that every installation has."""

from __future__ import annotations

import pytest

from xarch_kd.data.copying import copy_documents, copy_rows
from xarch_kd.data.corpus import BUILTIN, builtin_corpus
from xarch_kd.mapping_file.schema import Text


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_builtin_corpora_hold_text_and_are_the_same_each_time(name: str) -> None:
    first, second = BUILTIN[name](), BUILTIN[name]()
    assert sum(map(len, first.documents)) > 50_000
    assert first.sha256 == second.sha256


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_no_paragraph_of_a_builtin_corpus_stands_in_two_documents(name: str) -> None:
    corpus = BUILTIN[name]()
    parts = [part for text in corpus.documents for part in set(text.split("\n\n")) if len(part.strip()) >= 40]
    assert len(parts) == len(set(parts)) > 50


def test_copy_documents_repeat_their_identifiers_in_order_or_answer_every_key() -> None:
    for number, document in enumerate(copy_documents(40, seed=3)):
        parts = document.strip().split("\n\n")
        if number % 4 == 3:
            pairs, again = (part.split("\n") for part in (parts[0], parts[2]))
            assert 12 <= len(set(pairs)) <= 40 and pairs != again and sorted(pairs) == sorted(again)
        else:
            assert len(parts) == 5 and parts[0] == parts[2] == parts[4]
            assert len({parts[0], parts[1], parts[3]}) == 3


def test_generated_text_follows_from_its_own_seed_and_number() -> None:
    texts = [Text(builtin="copy", generated={"documents": 5, "seed": seed}) for seed in (0, 1)]  # type: ignore[arg-type]
    first, second = map(builtin_corpus, texts)
    assert len(first.documents) == len(second.documents) == 5
    assert not set(first.documents) & set(second.documents)
    assert len(builtin_corpus(Text(builtin="copy")).documents) == 400


def test_generated_is_refused_for_other_texts() -> None:
    with pytest.raises(ValueError, match="generated is for builtin: copy"):
        Text(builtin="licences", generated={"documents": 5})  # type: ignore[arg-type]


def test_copy_rows_have_the_ids_twice_around_the_filler_and_no_excluded_id() -> None:
    rows = copy_rows(60, [1, 2, 3], rows=50, items=8, excluded=[0, 59], seed=2)
    assert (rows[:, :8] == rows[:, 11:]).all() and (rows[:, 8:11] == [1, 2, 3]).all()
    assert all(len(set(row)) == 8 for row in rows[:, :8].tolist())
    assert set(rows[:, :8].flatten().tolist()) == set(range(1, 59))
