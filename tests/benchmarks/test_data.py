"""Benchmark of text: its table, its synthetic documents, and the part without a corpus."""

from __future__ import annotations

import json
from pathlib import Path

import numpy

from benchmarks.data import BOUNDS, CHARACTERS, chat_lengths, packing, table, write_texts


def test_the_table_shows_which_bounds_are_met() -> None:
    names = list(BOUNDS)
    lines, all_met = table({"one": {names[0]: 12.0, "method": "x"}, "two": {names[1]: 0.95}})
    assert all_met and len(lines) == 2
    assert lines[0].split() == ["memory", "to", "prepare", "12", "MB", "bound", "≤", "300", "met"]
    lines, all_met = table({"one": {names[0]: 301.0}, "two": {names[1]: 0.89}})
    assert not all_met and [line.split()[-1] for line in lines] == ["MISSED", "MISSED"]
    assert table({"one": {names[1]: 0.95}})[0][0].endswith("bound ≥ 0.9   met")


def test_documents_are_as_long_as_those_of_chats(tmp_path: Path) -> None:
    lengths = chat_lengths(20_000, numpy.random.default_rng(0))
    # The median of a log-normal distribution is exp(5.7).
    assert 285 < numpy.median(lengths) < 315 and lengths.min() >= 8 and lengths.max() <= 8192
    write_texts(tmp_path / "texts.jsonl", 10_000)
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert 0 <= sum(map(len, texts)) - 10_000 * CHARACTERS < 8192 * CHARACTERS
    assert len(set(texts)) == len(texts)


def test_the_padding_of_packed_chats_is_within_its_bound(tmp_path: Path) -> None:
    found = packing(tmp_path, {"documents": 3000})["padding of best_fit"]
    assert 0 < found < BOUNDS["padding of best_fit"][1]
