"""Corpora: content, splits, and messages for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xarch_kd.data.corpus import BUILTIN, Corpus, read_corpus
from xarch_kd.errors import DataError


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_builtin_corpora_hold_text_and_are_the_same_each_time(name: str) -> None:
    first, second = read_corpus(builtin=name), read_corpus(builtin=name)
    assert sum(map(len, first.documents)) > 50_000
    assert first.sha256 == second.sha256


def _long_paragraphs(corpus: Corpus) -> set[str]:
    return {part for text in corpus.documents for part in text.split("\n\n") if len(part.strip()) >= 40}


def test_no_paragraph_of_the_python_docs_stands_in_two_topics() -> None:
    corpus = read_corpus(builtin="python-docs")
    parts = [part for text in corpus.documents for part in set(text.split("\n\n")) if len(part.strip()) >= 40]
    assert len(parts) == len(set(parts))


def test_held_out_text_loses_what_training_text_holds_too() -> None:
    shared, first, second = "s" * 50, "f" * 50, "o" * 50
    corpus = Corpus(name="c", description="c", documents=(f"{shared}\n\n{first}", f"{shared}\n\n{second}"))
    training, held_out = corpus.split(0.1, seed=0)
    assert {training.documents[0].removeprefix(f"{shared}\n\n"), held_out.documents[0]} == {first, second}


def test_held_out_text_that_is_all_in_the_training_text_is_refused() -> None:
    corpus = Corpus(name="c", description="c", documents=("s" * 50, "s" * 50))
    with pytest.raises(DataError, match="occurs in its training part too"):
        corpus.split(0.1, seed=0)


def test_the_split_shares_no_paragraph_and_loses_none() -> None:
    corpus = read_corpus(builtin="python-docs")
    training, held_out = corpus.split(0.1, seed=3)
    assert not _long_paragraphs(training) & _long_paragraphs(held_out)
    assert _long_paragraphs(training) | _long_paragraphs(held_out) == _long_paragraphs(corpus)
    share = sum(map(len, held_out.documents)) / sum(map(len, corpus.documents))
    assert 0.1 <= share < 0.5


def test_the_split_depends_on_the_seed_alone() -> None:
    corpus = read_corpus(builtin="python-docs")
    assert corpus.split(0.1, seed=1) == corpus.split(0.1, seed=1)
    assert corpus.split(0.1, seed=1) != corpus.split(0.1, seed=2)


def test_one_document_is_cut_at_a_line_break() -> None:
    corpus = Corpus(name="one", description="one", documents=("".join(f"line {i}\n" for i in range(100)),))
    training, held_out = corpus.split(0.2, seed=0)
    assert training.documents[0] + held_out.documents[0] == corpus.documents[0]
    assert training.documents[0].endswith("\n")


def test_files_are_documents_and_so_are_lines_of_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    lines = [json.dumps({"body": "second"}), "", json.dumps({"body": "third"})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    corpus = read_corpus(files=[str(tmp_path / "a.txt"), str(tmp_path / "*.jsonl")], column="body")
    assert corpus.documents == ("first", "second", "third")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", r"b\.jsonl:1: not a line of JSON"),
        ('{"other": "x"}', r"b\.jsonl:1: no text under 'text'[\s\S]*keys: other"),
        ("[1]", r"b\.jsonl:1: no text under 'text'[\s\S]*keys: list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "b.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_corpus(files=[str(tmp_path / "b.jsonl")])


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"matches nothing[\s\S]*absent/\*\.txt"):
        read_corpus(files=[str(tmp_path / "absent/*.txt")])


def test_text_of_blanks_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match=r"the text source '.*a\.txt' is empty"):
        read_corpus(files=[str(tmp_path / "a.txt")])


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="as UTF-8 text"):
        read_corpus(files=[str(tmp_path / "a.txt")])
