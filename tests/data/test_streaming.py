"""Rows of a streamed dataset: those of its documents, joined; a restored stream continues with the next token."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xarch_kd.data.splitting import is_held_out
from xarch_kd.data.streaming import DocumentStream, StreamedRows, first_documents
from xarch_kd.errors import CheckpointError, DataError
from xarch_kd.mapping_file.schema import Text
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


def _rows(folder: Path, **changes: Any) -> StreamedRows:
    settings: dict[str, Any] = {"sequence_length": 16, "batch_size": 3, "held_out": 0.2, "seed": 0, **changes}
    return StreamedRows(_stream(folder), **settings)


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


def test_what_cannot_be_streamed_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="no document to train on"):
        _rows(folder, held_out=0.9999999).draw()
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"save_to_disk[\s\S]*data\.streaming"):
        _rows(tmp_path).draw()
    with pytest.raises(DataError, match="cannot stream the dataset"):
        DocumentStream(Text(dataset=str(folder), split="train[:3]"), tiny_tokenizer()).chunks().__next__()
