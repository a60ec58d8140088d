"""Corpora that every installation has."""

from __future__ import annotations

import pytest

from xarch_kd.data.corpus import BUILTIN


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
