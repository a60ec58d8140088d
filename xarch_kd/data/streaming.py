"""Documents that are read and tokenized while they are trained on, for text larger than the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.records import Record
from xarch_kd.data.shapes import Shapes
from xarch_kd.data.splitting import is_held_out
from xarch_kd.data.streamed_records import record_stream
from xarch_kd.data.tokenization import DocumentTokenizer
from xarch_kd.errors import DataError
from xarch_kd.mapping_file.text import Text

# Records that are read and tokenized at a time: so many, or fewer of about so many characters together.
CHUNK_RECORDS: Final = 64
CHUNK_CHARACTERS: Final = 2**22
# Tokens of a document, all of which are held: whether it is held out depends on the whole of it.
LONGEST_DOCUMENT: Final = 2**24


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedDocument:
    """Token `ids` [length] of a document, which of them are to be predicted (None: all), and its content's hash."""

    ids: numpy.ndarray
    counted: numpy.ndarray | None
    content: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Documents of consecutive records of a source, and the state from which they are read again."""

    state: dict[str, Any]
    documents: tuple[StreamedDocument, ...]


class DocumentStream:
    """Documents of a text source, streamed in its own order and again from the start at its end.

    Raises DataError for a source that cannot be read or has no document, and for a document of more than 16 million
    tokens.
    """

    def __init__(self, text: Text, tokenizer: PreTrainedTokenizerBase) -> None:
        self.text, self._records = text, record_stream(text)
        self._tokenizer, self._shapes = DocumentTokenizer(tokenizer, text), Shapes(text)

    @property
    def name(self) -> str:
        """Short name for messages."""
        return self._records.name

    @property
    def content(self) -> Any:
        """JSON values that change with what is streamed, as far as that is known."""
        return self._records.content

    @property
    def description(self) -> str:
        """One line for tables."""
        return f"{self.name}, streamed"

    def chunks(self, state: Mapping[str, Any] | None = None) -> Iterator[Chunk]:
        """Yield the documents, from the start or from the `state` of a chunk on, without an end."""
        passes, place = (int(state["passes"]), state["place"]) if state is not None else (0, None)
        is_empty = place is None
        while True:
            before, held, size = {"passes": passes, "place": place}, list[Record](), 0
            for record, after in self._records.records(place):
                held.append(record)
                size += _characters(record)
                if len(held) == CHUNK_RECORDS or size >= CHUNK_CHARACTERS:
                    documents = self._tokenized(held)
                    is_empty = is_empty and not documents
                    # Before the next record is read, after which it is another place.
                    following = {"passes": passes, "place": after()}
                    yield Chunk(state=before, documents=documents)
                    before, held, size = following, [], 0
            if held:
                documents = self._tokenized(held)
                is_empty = is_empty and not documents
                yield Chunk(state=before, documents=documents)
            if is_empty:
                raise DataError(f"the text source '{self.name}' is empty", fix="name another split, files or dataset")
            passes, place = passes + 1, None

    def _tokenized(self, records: list[Record]) -> tuple[StreamedDocument, ...]:
        found: list[StreamedDocument] = []
        ids: list[numpy.ndarray] = []
        counted: list[numpy.ndarray | None] = []
        tokens = 0
        for batch in self._tokenizer.batches(self._shapes.documents(records)):
            for part in self._tokenizer.tokenize(batch):
                ids.append(part.ids.astype(numpy.uint32))
                counted.append(part.counted)
                tokens += len(part.ids)
                if tokens > LONGEST_DOCUMENT:
                    raise DataError(
                        f"{records[0].place}: a document that is too long to be streamed",
                        found=f"more than {LONGEST_DOCUMENT:,} tokens, which would all be in memory",
                        fix="leave out data.streaming, or split the document",
                    )
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
                ids, counted, tokens = [], [], 0
        return tuple(document for document in found if len(document.ids))


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
        raise DataError(f"the text source '{stream.name}' has no document to train on", fix="lower data.held_out")
    if training.flat_counted is not None and not training.flat_counted.any():
        raise DataError(
            f"no token of '{stream.name}' is to be predicted",
            found=f"{len(training):,} documents without labels at its beginning, train_on: {stream.text.train_on}",
            fix="train_on: all, or data with labels other than -100",
        )
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


def _characters(record: Record) -> int:
    """Return about how many characters a record has; a file of plain text, which is not read yet, fills a chunk."""
    if record.values is None:
        return CHUNK_CHARACTERS
    return sum(len(value) if isinstance(value, str) else len(str(value)) for value in record.values.values())
