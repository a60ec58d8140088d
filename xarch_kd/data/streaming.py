"""Rows of a dataset that is read and tokenized while it is trained on, for data larger than the disk."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.batches import Batch
from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.packing import Row, collated
from xarch_kd.data.records import Record
from xarch_kd.data.shapes import Shapes
from xarch_kd.data.splitting import is_held_out
from xarch_kd.data.tables import without_missing
from xarch_kd.data.tokenization import DocumentTokenizer
from xarch_kd.errors import CheckpointError, DataError
from xarch_kd.mapping_file.schema import Text

# Rows of the dataset that are read and tokenized at a time.
CHUNK_ROWS: Final = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedDocument:
    """Token `ids` [length] of a document, which of them are to be predicted (None: all), and its content's hash."""

    ids: numpy.ndarray
    counted: numpy.ndarray | None
    content: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Documents of consecutive rows of a dataset, and the state from which they are read again."""

    state: dict[str, Any]
    documents: tuple[StreamedDocument, ...]


class DocumentStream:
    """Documents of a dataset of the library `datasets`, streamed in its own order and again from the start at its end.

    Raises DataError for a dataset that cannot be streamed, and for one without a document.
    """

    def __init__(self, text: Text, tokenizer: PreTrainedTokenizerBase) -> None:
        assert text.dataset is not None
        self.text, self.name = text, text.dataset
        self._tokenizer, self._shapes = DocumentTokenizer(tokenizer, text), Shapes(text)

    @property
    def description(self) -> str:
        """One line for tables."""
        return f"dataset {self.name}, streamed"

    def chunks(self, state: Mapping[str, Any] | None = None) -> Iterator[Chunk]:
        """Yield the documents, from the start or from the `state` of a chunk on, without an end."""
        dataset = self._load()
        passes = 0
        if state is not None:
            passes = int(state["passes"])
            dataset.load_state_dict(state["dataset"])
        while True:
            before = {"passes": passes, "dataset": dataset.state_dict()}
            rows: list[Mapping[str, Any]] = []
            is_empty = True
            for row in dataset:
                rows.append(row)
                if len(rows) == CHUNK_ROWS:
                    is_empty = False
                    yield Chunk(state=before, documents=self._tokenized(rows))
                    before, rows = {"passes": passes, "dataset": dataset.state_dict()}, []
            if rows:
                is_empty = False
                yield Chunk(state=before, documents=self._tokenized(rows))
            if is_empty and state is None:
                raise DataError(f"the dataset '{self.name}' has no rows", fix="name another split or dataset")
            passes, state = passes + 1, None
            dataset = self._load()

    def _tokenized(self, rows: list[Mapping[str, Any]]) -> tuple[StreamedDocument, ...]:
        records = (Record(self.name, {key: without_missing(value) for key, value in row.items()}) for row in rows)
        found: list[StreamedDocument] = []
        ids: list[numpy.ndarray] = []
        counted: list[numpy.ndarray | None] = []
        for batch in self._tokenizer.batches(self._shapes.documents(records)):
            for part in self._tokenizer.tokenize(batch):
                ids.append(part.ids)
                counted.append(part.counted)
                if part.content is None:
                    continue
                labels = None
                if any(own is not None for own in counted):
                    labels = numpy.concatenate(
                        [
                            numpy.ones(len(of), bool) if own is None else own
                            for of, own in zip(ids, counted, strict=True)
                        ]
                    )
                content = int.from_bytes(part.content, "little")
                found.append(StreamedDocument(ids=numpy.concatenate(ids), counted=labels, content=content))
                ids, counted = [], []
        return tuple(document for document in found if len(document.ids))

    def _load(self) -> Any:
        datasets = importlib.import_module("datasets")
        folder = Path(self.name).expanduser()
        try:
            if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
                raise DataError(
                    f"the dataset '{self.name}' is a folder of save_to_disk, which is on this disk already",
                    fix="leave out data.streaming",
                )
            return datasets.load_dataset(
                str(folder) if folder.is_dir() else self.name,
                self.text.dataset_config,
                split=self.text.split or "train",
                revision=self.text.revision,
                streaming=True,
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot stream the dataset '{self.name}'",
                found=f"{type(error).__name__}: {error}"[:400],
                fix="check its name, dataset_config, split (a name alone, without a range) and revision",
            ) from error


class StreamedRows:
    """Batch source of a stage on streamed documents: joined, and cut every `sequence_length` tokens.

    Documents that a hash of their content holds out are left out. The state is the place of the oldest rows that are
    not used up and how many tokens of them are, so that a resumed stage continues with the next token.
    """

    def __init__(
        self,
        stream: DocumentStream,
        *,
        sequence_length: int,
        batch_size: int,
        held_out: float,
        seed: int,
        isolated: bool = False,
    ) -> None:
        self.stream, self.sequence_length, self.batch_size = stream, sequence_length, batch_size
        self.held_out, self.seed, self.isolated = held_out, seed, isolated
        self.drawn = 0
        self._chunks = stream.chunks()
        self._buffer: deque[tuple[dict[str, Any], Row]] = deque()
        self._used = 0

    def draw(self) -> Batch:
        """Return the next micro-batch. Raises DataError where a whole pass has no document to train on."""
        rows = [self._row() for _ in range(self.batch_size)]
        self.drawn += 1
        return collated(rows, origin=f"batch {self.drawn - 1} of the stream")

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        if not self._buffer:
            self._read()
        return {"drawn": self.drawn, "place": self._buffer[0][0], "used": self._used, "source": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the next token. Raises CheckpointError for the state of another stream."""
        if state.get("source") != self._identity:
            raise CheckpointError(
                "the checkpoint was trained on other batches than this stage draws",
                asked=self._identity,
                found=state.get("source"),
                fix="restore the mapping file of the run, or give another --output",
            )
        self.drawn, self._used = int(state["drawn"]), int(state["used"])
        self._chunks = self.stream.chunks(state["place"])
        self._buffer.clear()

    @property
    def _identity(self) -> list[Any]:
        text = self.stream.text.model_dump(mode="json")
        return [text, self.sequence_length, self.batch_size, self.held_out, self.seed, self.isolated]

    def _row(self) -> Row:
        length = self.sequence_length
        while sum(len(row.ids) for _, row in self._buffer) < self._used + length:
            self._read()
        parts: list[Row] = []
        missing = length
        while missing:
            row = self._buffer[0][1]
            taken = slice(self._used, min(self._used + missing, len(row.ids)))
            parts.append(_sliced(row, taken))
            missing -= taken.stop - taken.start
            self._used = taken.stop
            if self._used == len(row.ids):
                self._buffer.popleft()
                self._used = 0
        return _begun_at_0(_joined(parts), self.isolated)

    def _read(self) -> None:
        """Add the training documents of the next chunk to the buffer."""
        passes = None
        for chunk in self._chunks:
            passes = int(chunk.state["passes"]) if passes is None else passes
            rows = [
                Row(
                    ids=document.ids.astype(numpy.int64),
                    counted=document.counted,
                    positions=numpy.arange(len(document.ids)),
                )
                for document in chunk.documents
                if not is_held_out(document.content, self.held_out, seed=self.seed)
            ]
            if rows:
                self._buffer.append((chunk.state, _joined(rows)))
                return
            if int(chunk.state["passes"]) > passes + 1:
                raise DataError(
                    f"the dataset '{self.stream.name}' has no document to train on", fix="lower data.held_out"
                )


def first_documents(
    stream: DocumentStream, *, training_tokens: int, held_out_tokens: int, held_out: float, seed: int
) -> tuple[TokenizedDocuments, TokenizedDocuments | None]:
    """Return the first training documents of a stream and the first that are held out, of at least so many tokens.

    Fewer if a pass over the stream has fewer; None if none is held out.
    """
    sides: tuple[list[StreamedDocument], list[StreamedDocument]] = ([], [])
    tokens = [0, 0]
    wanted = (training_tokens, held_out_tokens if held_out else 0)
    for chunk in stream.chunks():
        if chunk.state["passes"] > 0 or (tokens[0] >= wanted[0] and tokens[1] >= wanted[1]):
            break
        for document in chunk.documents:
            side = int(is_held_out(document.content, held_out, seed=seed))
            if tokens[side] < wanted[side]:
                sides[side].append(document)
                tokens[side] += len(document.ids)
    training, held = (_in_memory(side, stream) if side else None for side in sides)
    if training is None:
        raise DataError(f"the dataset '{stream.name}' has no document to train on", fix="lower data.held_out")
    return training, held


def _in_memory(documents: list[StreamedDocument], stream: DocumentStream) -> TokenizedDocuments:
    counted = None
    if any(document.counted is not None for document in documents):
        counted = [
            [True] * len(document.ids) if document.counted is None else document.counted.tolist()
            for document in documents
        ]
    description = f"the first {len(documents):,} documents of {stream.description}"
    ids = [document.ids.tolist() for document in documents]
    return TokenizedDocuments.of(ids, counted, name=stream.name, description=description)


def _sliced(row: Row, taken: slice) -> Row:
    positions = None if row.positions is None else row.positions[taken]
    return Row(ids=row.ids[taken], counted=None if row.counted is None else row.counted[taken], positions=positions)


def _joined(rows: list[Row]) -> Row:
    """Return rows one after another."""
    counted = None
    if any(row.counted is not None for row in rows):
        counted = numpy.concatenate(
            [numpy.ones(len(row.ids), bool) if row.counted is None else row.counted for row in rows]
        )
    positions = numpy.concatenate([numpy.empty(0) if row.positions is None else row.positions for row in rows])
    return Row(ids=numpy.concatenate([row.ids for row in rows]), counted=counted, positions=positions)


def _begun_at_0(row: Row, isolated: bool) -> Row:
    """Return a row with the positions that a model takes: from 0 in each document, or None where they are joined."""
    if not isolated or row.positions is None:
        return Row(ids=row.ids, counted=row.counted, positions=None)
    starts = (row.positions == 0).nonzero()[0]
    inside = int(starts[0]) if len(starts) else len(row.ids)
    positions = row.positions.copy()
    positions[:inside] = numpy.arange(inside)
    return Row(ids=row.ids, counted=row.counted, positions=positions)
