"""Rows of a streamed dataset: those of its documents, joined; a restored stream continues with the next token."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from xarch_kd.data.batches import Batch
from xarch_kd.data.rows import BatchOrder
from xarch_kd.data.splitting import is_held_out
from xarch_kd.data.streamed_rows import StreamedRows
from xarch_kd.data.streaming import DocumentStream, first_documents
from xarch_kd.errors import CheckpointError, DataError
from xarch_kd.mapping_file.schema import Text
from xarch_kd.mapping_file.text import Generated
from xarch_kd.testing.tiny import tiny_tokenizer

DOCUMENTS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streamed")
    for shard in range(2):
        own = [{"text": f"document {number} " + "x" * (number % 9)} for number in range(shard * 75, shard * 75 + 75)]
        (path / f"train-{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return path


def _stream(folder: Path) -> DocumentStream:
    return DocumentStream(Text(dataset=str(folder)), tiny_tokenizer())


def _rows(*texts: Path | Text, weights: tuple[float, ...] = (1.0,), **changes: Any) -> StreamedRows:
    settings: dict[str, Any] = {"sequence_length": 16, "packing": "wrapped", "held_out": 0.2, **changes}
    order = BatchOrder(sizes=(9,) * len(texts), weights=weights, batch_size=3, distinct=99, seed=0, stage=0)
    named = (text if isinstance(text, Text) else Text(dataset=str(text)) for text in texts)
    return StreamedRows([DocumentStream(text, tiny_tokenizer()) for text in named], order, **settings)


def _expected(passes: int) -> tuple[list[int], list[int]]:
    """Return the training tokens of whole passes, and their positions in their documents, one document at a time."""
    tokenizer = tiny_tokenizer()
    tokens: list[int] = []
    positions: list[int] = []
    for number in list(range(DOCUMENTS)) * passes:
        text = f"document {number} " + "x" * (number % 9)
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if not is_held_out(CONTENTS[number], 0.2, seed=0):
            tokens += ids
            positions += range(len(ids))
    return tokens, positions


CONTENTS: dict[int, int] = {}


@pytest.fixture(autouse=True)
def _hashes(folder: Path) -> None:
    if not CONTENTS:
        chunks = itertools.takewhile(lambda chunk: chunk.state["passes"] == 0, _stream(folder).chunks())
        CONTENTS.update(enumerate(document.content for chunk in chunks for document in chunk.documents))
    assert len(CONTENTS) == DOCUMENTS == len(set(CONTENTS.values()))


def test_rows_are_the_training_documents_joined_pass_after_pass(folder: Path) -> None:
    tokens, _ = _expected(2)
    source = _rows(folder)
    batches = len(tokens) // 48
    found = torch.cat([source.draw().input_ids.flatten() for _ in range(batches)])
    assert found.tolist() == tokens[: batches * 48]
    assert len(_expected(1)[0]) < batches * 48


@pytest.mark.parametrize("drawn", [0, 1, 7, 60])
def test_a_restored_stream_continues_with_the_next_token(folder: Path, drawn: int) -> None:
    first = _rows(folder, isolated=True)
    for _ in range(drawn):
        first.draw()
    state = json.loads(json.dumps(first.state_dict()))
    second = _rows(folder, isolated=True)
    second.load_state_dict(state)
    for _ in range(20):
        own, other = first.draw(), second.draw()
        assert own.fingerprint == other.fingerprint and own.origin == other.origin
    with pytest.raises(CheckpointError, match="other batches"):
        _rows(folder, sequence_length=32).load_state_dict(state)


def test_positions_of_isolated_documents_begin_at_0_in_each_row(folder: Path) -> None:
    _, positions = _expected(1)
    batch = _rows(folder, isolated=True).draw()
    assert batch.position_ids is not None
    for row, found in enumerate(batch.position_ids.tolist()):
        expected = positions[16 * row : 16 * row + 16]
        inside = expected.index(0) if 0 in expected else 16
        assert found == [*range(inside), *expected[inside:]]


def test_the_first_documents_are_for_calibration_and_the_held_out_ones_are_not_trained_on(folder: Path) -> None:
    training, held = first_documents(_stream(folder), training_tokens=100, held_out_tokens=60, held_out=0.2, seed=0)
    assert 100 <= training.tokens < 130 and held is not None and 60 <= held.tokens < 90
    assert training.ids(0).tolist() == _expected(1)[0][: training.lengths[0]]
    decoded = {str(tiny_tokenizer().decode(held.ids(number).tolist())) for number in range(len(held))}
    trained = str(tiny_tokenizer().decode(_expected(1)[0]))
    assert not any(text in trained for text in decoded)
    assert first_documents(_stream(folder), training_tokens=9, held_out_tokens=9, held_out=0.0, seed=0)[1] is None


EOS = tiny_tokenizer().eos_token_id


def test_whole_documents_are_packed_in_windows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each document is whole and, over whole passes, as often there as every other (windows are no whole passes)."""
    monkeypatch.setattr("xarch_kd.data.streamed_rows.WINDOW_ROWS", 24)
    source = _rows(folder, packing="best_fit", sequence_length=64, isolated=True)
    rows = tokens = 0
    found: Counter[tuple[int, ...]] = Counter()
    while not found or min(found.values()) < 2:
        batch = source.draw()
        rows, tokens = rows + 3, tokens + batch.tokens
        for row, positions in zip(range(3), _positions(batch), strict=True):
            ids = batch.input_ids[row].tolist()
            if batch.attention_mask is not None:
                ids = ids[: int(batch.attention_mask[row].sum())]
                positions = positions[: len(ids)]
            starts = [at for at, position in enumerate(positions) if position == 0] + [len(ids)]
            found.update(tuple(ids[at:end]) for at, end in itertools.pairwise(starts) if ids[end - 1] == EOS)
        assert rows < 500
    expected, _ = _expected(1)
    assert sorted(itertools.chain(*found)) == sorted(expected)
    assert max(found.values()) <= 4 and tokens / (rows * 64) > 0.9


def _positions(batch: Batch) -> list[list[int]]:
    if batch.position_ids is None:
        return [list(range(batch.input_ids.shape[1]))] * len(batch.input_ids)
    return batch.position_ids.tolist()


def test_rows_of_one_document_come_in_batches_of_similar_length(folder: Path) -> None:
    source = _rows(folder, packing="none", sequence_length=32)
    lengths: list[list[int]] = []
    documents: Counter[tuple[int, ...]] = Counter()
    for _ in range(32):
        batch = source.draw()
        rows = batch.input_ids.tolist()
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        lengths.append(mask.sum(1).tolist())
        documents.update(tuple(row[:length]) for row, length in zip(rows, lengths[-1], strict=True))
    assert documents.total() == len(documents) == 96
    # Every batch is a run of the sorted lengths of all 96 rows.
    assert sorted(itertools.chain(*lengths)) == list(itertools.chain(*sorted(map(sorted, lengths))))
    assert lengths != sorted(lengths)


def _written(folder: Path, kind: str) -> Text:
    """Return a source of 150 documents, each kind with the same ones."""
    rows = [{"text": f"document {number} " + "x" * (number % 9)} for number in range(DOCUMENTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "dataset":
        Dataset.from_list(rows).save_to_disk(folder / "saved")
        return Text(dataset=str(folder / "saved"))
    if kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    if kind == "folder":
        (folder / "1.jsonl").write_text("".join(lines.splitlines(keepends=True)[:70]))
        (folder / "2.csv").write_text("text\n" + "".join(row["text"] + "\n" for row in rows[70:]))
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    if kind == "txt":
        for number, row in enumerate(rows):
            (folder / f"{number:03}.txt").write_text(row["text"])
    return Text(files=(str(folder),))


@pytest.mark.parametrize("kind", ["dataset", "jsonl.gz", "folder", "parquet", "txt"])
def test_every_source_streams_the_same_rows_and_continues_where_it_was(tmp_path: Path, kind: str) -> None:
    text = _written(tmp_path, kind)
    tokens, _ = _expected(1)
    first = _rows(text)
    for _ in range(5):
        first.draw()
    state = json.loads(json.dumps(first.state_dict()))
    second = _rows(text)
    second.load_state_dict(state)
    drawn = torch.cat([second.draw().input_ids.flatten() for _ in range(8)])
    assert drawn.tolist() == tokens[5 * 48 : 13 * 48]
    if kind == "txt":
        (tmp_path / "000.txt").write_text("another size")
        with pytest.raises(CheckpointError, match="other batches"):
            _rows(text).load_state_dict(state)


@pytest.mark.parametrize("packing", ["wrapped", "best_fit", "none"])
def test_a_mixture_draws_each_source_in_its_share_and_continues(
    folder: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    monkeypatch.setattr("xarch_kd.data.streamed_rows.WINDOW_ROWS", 8)
    monkeypatch.setattr("xarch_kd.data.streamed_rows.WINDOW_BATCHES", 4)
    sources = (folder, Text(builtin="copy", generated=Generated(documents=20, seed=1)))

    def mixed() -> StreamedRows:
        return _rows(*sources, weights=(0.75, 0.25), packing=packing)

    first, second = mixed(), mixed()
    for _ in range(13):
        first.draw()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [first.draw().fingerprint for _ in range(5)] == [second.draw().fingerprint for _ in range(5)]
    shares = [first.order.source(draw) for draw in range(1000)]
    assert shares.count(0) == 750


def test_what_cannot_be_streamed_is_named(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no document to train on"):
        _rows(folder, held_out=0.9999999).draw()
    with pytest.raises(DataError, match=r"cannot stream the dataset[\s\S]*without a range"):
        _rows(Text(dataset=str(folder), split="train[:3]")).draw()
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        _rows(Text(files=(str(tmp_path / "a.jsonl"),))).draw()
    (tmp_path / "b.jsonl").write_text(json.dumps({"input_ids": [5, 6], "labels": [-100, -100]}))
    with pytest.raises(DataError, match=r"no token of .* is to be predicted"):
        stream = DocumentStream(Text(files=(str(tmp_path / "b.jsonl"),)), tiny_tokenizer())
        first_documents(stream, training_tokens=9, held_out_tokens=9, held_out=0.0, seed=0)
    monkeypatch.setattr("xarch_kd.data.streaming.LONGEST_DOCUMENT", 20)
    (tmp_path / "c.txt").write_text("x" * 30)
    with pytest.raises(DataError, match=r"c\.txt: a document that is too long to be streamed"):
        _rows(Text(files=(str(tmp_path / "c.txt"),)), held_out=0.0).draw()
