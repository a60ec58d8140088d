"""Corpora: content, and messages for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xarch_kd.data.corpus import BUILTIN, read_corpus
from xarch_kd.errors import DataError


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_builtin_corpora_hold_text_and_are_the_same_each_time(name: str) -> None:
    first, second = read_corpus(builtin=name), read_corpus(builtin=name)
    assert sum(map(len, first.documents)) > 50_000
    assert first.sha256 == second.sha256


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_no_paragraph_of_a_builtin_corpus_stands_in_two_documents(name: str) -> None:
    corpus = read_corpus(builtin=name)
    parts = [part for text in corpus.documents for part in set(text.split("\n\n")) if len(part.strip()) >= 40]
    assert len(parts) == len(set(parts)) > 50


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
