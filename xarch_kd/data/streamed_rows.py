"""Rows of streamed documents: cut across documents, packed in windows, or one document per row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, Final, Protocol

import numpy

from xarch_kd.data.batches import Batch
from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.packing import Packing, Row, collated, pack
from xarch_kd.data.rows import WINDOW_BATCHES, BatchOrder, permutation
from xarch_kd.data.splitting import is_held_out
from xarch_kd.data.streaming import Chunk, DocumentStream, StreamedDocument
from xarch_kd.errors import CheckpointError, DataError

# Rows that documents are packed into together.
WINDOW_ROWS: Final = 256


class _TrainingDocuments:
    """Documents of a stream that are not held out, one after another from a place on."""

    def __init__(self, stream: DocumentStream, *, held_out: float, seed: int) -> None:
        self._stream, self._held_out, self._seed = stream, held_out, seed
        self.start_at(None)

    @property
    def place(self) -> dict[str, Any] | None:
        """Place of the next document: the state of a chunk, and a number in it."""
        return None if self._chunk is None else {"chunk": self._chunk.state, "document": self._index}

    def start_at(self, place: Mapping[str, Any] | None) -> None:
        """Continue at a place, None for the start of the stream."""
        self._chunks: Iterator[Chunk] = self._stream.chunks(None if place is None else place["chunk"])
        self._chunk: Chunk | None = None if place is None else next(self._chunks)
        self._index = 0 if place is None else int(place["document"])

    def next(self) -> StreamedDocument:
        """Return the next document. Raises DataError where a whole pass has no document to train on."""
        begun: int | None = None
        while True:
            while self._chunk is None or self._index == len(self._chunk.documents):
                self._chunk, self._index = next(self._chunks), 0
                passes = int(self._chunk.state["passes"])
                begun = passes if begun is None else begun
                if passes > begun + 1:
                    raise DataError(
                        f"the text source '{self._stream.name}' has no document to train on", fix="lower data.held_out"
                    )
            document = self._chunk.documents[self._index]
            self._index += 1
            if not is_held_out(document.content, self._held_out, seed=self._seed):
                return document


class _RowStream(Protocol):
    """Rows of the training documents of one stream, in order."""

    def row(self) -> Row: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _WrappedRows:
    """Documents one after another, cut every `length` tokens. The state is the next token."""

    def __init__(self, documents: _TrainingDocuments, *, length: int, isolated: bool) -> None:
        self._documents, self._length, self._isolated = documents, length, isolated
        self._place = documents.place
        self._document: StreamedDocument | None = None
        self._token = 0

    def row(self) -> Row:
        ids: list[numpy.ndarray] = []
        counted: list[numpy.ndarray | None] = []
        missing = self._length
        while missing:
            if self._document is None or self._token == len(self._document.ids):
                self._place, self._token = self._documents.place, 0
                self._document = self._documents.next()
            part = slice(self._token, self._token + missing)
            ids.append(self._document.ids[part].astype(numpy.int64))
            counted.append(None if self._document.counted is None else self._document.counted[part])
            self._token += len(ids[-1])
            missing -= len(ids[-1])
        positions = numpy.concatenate([numpy.arange(len(own)) for own in ids]) if self._isolated else None
        return Row(ids=numpy.concatenate(ids), counted=_labels(ids, counted), positions=positions)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self._place, "token": self._token}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._place, self._token = state["place"], int(state["token"])
        self._documents.start_at(self._place)
        self._document = self._documents.next() if self._token else None


class _PackedWindows:
    """Rows that are packed from a window of documents at a time, in a random order inside the window.

    A window has the documents of 256 rows, or with one document per row those of `batches` batches, each of documents
    of similar length. The state is the place of the window and the number of its rows that were used.
    """

    def __init__(
        self, documents: _TrainingDocuments, *, length: int, packing: Packing, isolated: bool, batch: int, seed: int
    ) -> None:
        self._documents, self._length, self._isolated = documents, length, isolated
        self._packing: Packing = packing
        self._batch, self._seed = batch, seed
        self._place = documents.place
        self._rows: list[Row] = []
        self._window = self._used = 0

    def row(self) -> Row:
        if self._used == len(self._rows):
            if self._rows:
                self._place, self._window = self._documents.place, self._window + 1
            self._fill()
        self._used += 1
        return self._rows[self._used - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self._place, "window": self._window, "used": self._used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._place, self._window = state["place"], int(state["window"])
        self._documents.start_at(self._place)
        self._rows, self._used = [], 0
        if state["used"]:
            self._fill()
            self._used = int(state["used"])

    def _fill(self) -> None:
        held: list[StreamedDocument] = []
        tokens = 0
        single = self._packing == "none"
        while len(held) < WINDOW_BATCHES * self._batch if single else tokens < WINDOW_ROWS * self._length:
            held.append(self._documents.next())
            tokens += len(held[-1].ids)
        packed = pack(_together(held), self._length, packing=self._packing, isolated=self._isolated)
        key = (self._seed, self._window)
        if packed.lengths is None:
            order = permutation(len(packed), key)
        else:
            batches = numpy.argsort(packed.lengths, kind="stable").reshape(WINDOW_BATCHES, self._batch)
            order = batches[permutation(WINDOW_BATCHES, key)].flatten()
        self._rows, self._used = [packed.row(int(row)) for row in order], 0


class StreamedRows:
    """Batch source of a stage on streamed documents, of one stream or of several in the shares of `order`.

    Documents that a hash of their content holds out are left out. The state is the place in each stream, so that a
    resumed stage continues with the next row.
    """

    def __init__(
        self,
        streams: Sequence[DocumentStream],
        order: BatchOrder,
        *,
        sequence_length: int,
        packing: Packing,
        held_out: float,
        isolated: bool = False,
    ) -> None:
        self.streams, self.order = tuple(streams), order
        self._settings = [sequence_length, packing, held_out, isolated]
        self.drawn = 0
        self._parts: list[_RowStream] = []
        for number, stream in enumerate(self.streams):
            documents = _TrainingDocuments(stream, held_out=held_out, seed=order.seed)
            self._parts.append(
                _WrappedRows(documents, length=sequence_length, isolated=isolated)
                if packing == "wrapped"
                else _PackedWindows(
                    documents,
                    length=sequence_length,
                    packing=packing,
                    isolated=isolated,
                    batch=order.batch_size,
                    seed=order.seed + number,
                )
            )

    def draw(self) -> Batch:
        """Return the next micro-batch. Raises DataError where a whole pass has no document to train on."""
        first = self.drawn * self.order.batch_size
        rows = [self._parts[self.order.source(first + place)].row() for place in range(self.order.batch_size)]
        self.drawn += 1
        return collated(rows, origin=f"batch {self.drawn - 1} of the stream")

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"drawn": self.drawn, "parts": [part.state_dict() for part in self._parts], "source": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the next row. Raises CheckpointError for the state of another stream."""
        if state.get("source") != self._identity:
            raise CheckpointError(
                "the checkpoint was trained on other batches than this stage draws",
                asked=self._identity,
                found=state.get("source"),
                fix="restore the mapping file of the run and its text, or give another --output",
            )
        self.drawn = int(state["drawn"])
        for part, own in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(own)

    @cached_property
    def _identity(self) -> list[Any]:
        texts = [stream.text.model_dump(mode="json", exclude={"processes"}) for stream in self.streams]
        order = {name: value for name, value in asdict(self.order).items() if name not in ("sizes", "distinct")}
        # As JSON returns it: with lists for tuples.
        return json.loads(json.dumps([texts, [stream.content for stream in self.streams], order, self._settings]))


def _together(documents: Sequence[StreamedDocument]) -> TokenizedDocuments:
    """Return documents of a window, to be packed; their fingerprint is not needed."""
    lengths = numpy.array([len(document.ids) for document in documents], dtype=numpy.int64)
    return TokenizedDocuments(
        name="a stream",
        description="a window of a stream",
        lengths=lengths,
        hashes=numpy.array([document.content for document in documents], dtype=numpy.uint64),
        fingerprint="",
        flat_ids=numpy.concatenate([document.ids for document in documents]),
        flat_counted=_labels([document.ids for document in documents], [document.counted for document in documents]),
        starts=numpy.cumsum(lengths) - lengths,
    )


def _labels(ids: Sequence[numpy.ndarray], counted: Sequence[numpy.ndarray | None]) -> numpy.ndarray | None:
    """Return which tokens are to be predicted, None for all."""
    if all(own is None for own in counted):
        return None
    return numpy.concatenate(
        [numpy.ones(len(of), bool) if own is None else own for of, own in zip(ids, counted, strict=True)]
    )
