"""Documents to token ids with labels: bos and eos tokens, batches, and texts that are too long for one call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.chat import ChatTemplate, RenderedText
from xarch_kd.data.long_text import LongText, encoded
from xarch_kd.data.shapes import Conversation, Document, PlainText, PromptCompletion, TokenIds
from xarch_kd.errors import DataError
from xarch_kd.mapping_file.schema import Text

# One call of the tokenizer has at most so many documents, and about so many characters.
BATCH_DOCUMENTS: Final = 1024
BATCH_CHARACTERS: Final = 2**20

# Tokens that are tried as a text where the tokenizer has none for a letter.
PROBES: Final = 16


@dataclass(frozen=True, slots=True)
class TokenizedPart:
    """Token ids of a document, or of a part of a long one, and which are to be predicted (None: all).

    The last part of a document has the hash of its content (8 bytes), the others None.
    """

    ids: numpy.ndarray
    counted: numpy.ndarray | None
    content: bytes | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document that is ready for the tokenizer: its text, or the ids and labels that it has already."""

    text: RenderedText | None
    ids: list[int]
    counted: list[bool] | None
    content: bytes
    is_chat: bool
    ends_counted: bool
    place: str


@dataclass(frozen=True, slots=True)
class ShortText:
    """A plain text that one call of the tokenizer takes, with the hash [8 bytes] of its content."""

    place: str
    text: str
    digest: bytes


# Documents of a batch before templates and tokenizer, which processes can send each other.
RawDocument = ShortText | PromptCompletion | Conversation | TokenIds
RawBatch = list[RawDocument]


class DocumentTokenizer:
    """Tokenizer of documents as a text source of a mapping file sets it: `train_on`, `bos`, `eos`.

    `blank` counts the texts without a character that is no blank, which are left out. Prepared batches may be tokenized
    in several threads, and a copy of this object in another process gives the same tokens.

    Raises DataError for `bos: always` or `eos: always` with a tokenizer that has no such token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: Text) -> None:
        self.tokenizer, self.train_on = tokenizer, text.train_on
        self.blank = 0
        self._front = _added_in_front(tokenizer)
        self._bos, self._eos = text.bos, text.eos
        self._chat = ChatTemplate(tokenizer)
        for name in ("bos", "eos"):
            if getattr(text, name) == "always" and getattr(tokenizer, f"{name}_token_id") is None:
                raise DataError(
                    f"{name}: always, but the tokenizer has no {name} token",
                    fix=f"{name}: auto, or a tokenizer with that token: teacher: {{tokenizer: …}}",
                )

    @property
    def separates(self) -> bool:
        """True unless plain texts get neither a bos nor an eos token because the tokenizer has none for them."""
        adds_bos = self._bos == "always" or (self._bos == "auto" and bool(self._front))
        return adds_bos or self._eos == "never" or self.tokenizer.eos_token_id is not None

    def batches(self, documents: Iterable[Document]) -> Iterator[RawBatch | LongText]:
        """Yield documents in batches for `tokenize`, of one call of the tokenizer each, or one long text.

        Texts without a character that is no blank are left out and counted.
        """
        batch: RawBatch = []
        size = 0
        for document in documents:
            raw = self._raw(document)
            if isinstance(raw, LongText):
                if batch:
                    yield batch
                batch, size = [], 0
                yield raw
                continue
            if raw is None:
                continue
            batch.append(raw)
            size += _characters(raw)
            if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def prepare(self, batch: RawBatch) -> list[Prepared]:
        """Return the documents of a batch as texts for the tokenizer, conversations through the chat template."""
        return [self._prepare(document) for document in batch]

    def tokenize(self, batch: RawBatch | LongText) -> Iterator[TokenizedPart]:
        """Return what one batch is as token ids."""
        return self._long(batch) if isinstance(batch, LongText) else self.encode(self.prepare(batch))

    def encode(self, batch: list[Prepared]) -> Iterator[TokenizedPart]:
        """Yield what prepared documents are as token ids."""
        texts = [prepared.text for prepared in batch if prepared.text is not None]
        found = iter(encoded(self.tokenizer, texts)) if texts else iter(())
        for prepared in batch:
            ids, counted = next(found) if prepared.text is not None else (prepared.ids, prepared.counted)
            yield self._finished(prepared, ids, counted)

    def _raw(self, document: Document) -> RawDocument | LongText | None:
        """Return a document with all of its text, or the beginning of a long one; None for blanks."""
        if isinstance(document, PlainText):
            long = LongText(document)
            if not long.is_short:
                return long
            is_blank = not long.start.strip()
            raw: RawDocument = ShortText(document.place, long.start, long.digest)
        else:
            is_blank = isinstance(document, PromptCompletion) and not (document.prompt + document.completion).strip()
            raw = document
        self.blank += is_blank
        return None if is_blank else raw

    def _prepare(self, document: RawDocument) -> Prepared:
        match document:
            case ShortText(place=place, text=text, digest=digest):
                if self.train_on in ("completions", "assistant"):
                    raise self._without_parts(place, "plain text has no")
                return _prepared(place, RenderedText(place, text), content=digest)
            case PromptCompletion(place=place, prompt=prompt, completion=completion):
                if self.train_on == "assistant":
                    raise self._without_parts(place, "prompt and completion have no")
                text = prompt + completion
                spans = None if self.train_on == "all" else ((len(prompt), len(text)),)
                content = content_digest([prompt, completion])
                return _prepared(place, RenderedText(place, text, spans), content=content)
            case Conversation():
                return self._conversation(document)
            case TokenIds(place=place, ids=ids, counted=counted):
                if self.train_on in ("completions", "assistant"):
                    raise self._without_parts(place, "token ids have no")
                self._check_ids(document)
                counted = None if self.train_on == "all" else counted
                content = content_digest(ids)
                ends = counted is None or counted[-1]
                return _prepared(place, None, ids=ids, counted=counted, content=content, is_chat=True, ends=ends)

    def _conversation(self, document: Conversation) -> Prepared:
        train_on = self.train_on
        if train_on == "auto":
            train_on = "assistant" if document.completion is None else "completions"
        content = content_digest([document.messages, document.tools])
        ends = train_on == "all" or document.messages[-1]["role"] == "assistant"
        if train_on == "assistant" and self._chat.marks_generation(document):
            ids, counted = self._chat.marked(document)
            return _prepared(document.place, None, ids=ids, counted=counted, content=content, is_chat=True, ends=ends)
        text = self._chat.render(document, train_on)
        return _prepared(document.place, text, content=content, is_chat=True, ends=ends)

    def _finished(self, prepared: Prepared, ids: Any, counted: Any) -> TokenizedPart:
        """Return the token ids of a document with the bos and eos tokens that its settings give it."""
        front, back = self._around(ids, is_chat=prepared.is_chat)
        dropped = self._dropped(ids, is_chat=prepared.is_chat)
        inner = numpy.asarray(ids[dropped[0] : len(ids) - dropped[1]], dtype=numpy.int64)
        if len(front) + len(inner) + len(back) == 0:
            raise DataError(f"{prepared.place}: a document without a token")
        whole = numpy.concatenate((numpy.array(front, numpy.int64), inner, numpy.array(back, numpy.int64)))
        mask = None
        if counted is not None:
            own = numpy.asarray(counted[dropped[0] : len(ids) - dropped[1]], dtype=bool)
            ends = numpy.full(len(back), prepared.ends_counted)
            mask = numpy.concatenate((numpy.zeros(len(front), dtype=bool), own, ends))
        return TokenizedPart(whole, mask, prepared.content)

    def _around(self, ids: Sequence[int] | numpy.ndarray, *, is_chat: bool) -> tuple[list[int], list[int]]:
        """Return the ids to add before and after a document; what is there already is not added again."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        front: list[int] = []
        if self._bos == "always":
            front = [bos]  # type: ignore[list-item]  # checked above
        elif self._bos == "auto" and not is_chat:
            front = self._front
        adds_eos = self._eos == "always" or (self._eos == "auto" and not is_chat and eos is not None)
        back = [eos] if adds_eos else []
        return (
            [] if front and list(ids[: len(front)]) == front else front,
            [] if back and len(ids) and ids[-1] == back[0] else back,  # type: ignore[return-value]
        )

    def _dropped(self, ids: Sequence[int], *, is_chat: bool) -> tuple[int, int]:
        """Return how many ids to drop at both ends: a bos or eos token of a conversation, with `never`."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        first = is_chat and self._bos == "never" and len(ids) > 0 and ids[0] == bos
        last = is_chat and self._eos == "never" and len(ids) > int(first) and ids[-1] == eos
        return int(first), int(last)

    def _long(self, long: LongText) -> Iterator[TokenizedPart]:
        """Yield a long text in parts."""
        if self.train_on in ("completions", "assistant"):
            raise self._without_parts(long.place, "plain text has no")
        is_first, back = True, []
        for ids in long.token_ids(self.tokenizer):
            front, back = self._around(ids, is_chat=False)
            if is_first:
                yield TokenizedPart(numpy.array(front, numpy.int64), None, None)
            is_first = False
            yield TokenizedPart(ids, None, None)
        yield TokenizedPart(numpy.array(back, numpy.int64), None, long.digest)

    def _check_ids(self, document: TokenIds) -> None:
        size = len(self.tokenizer)
        wrong = next((token for token in document.ids if not 0 <= token < size), None)
        if wrong is not None:
            raise DataError(
                f"{document.place}: a token id that the tokenizer does not have",
                found=wrong,
                allowed=f"0 to {size - 1}",
                fix="name the tokenizer that the ids were made with: teacher: {tokenizer: …}",
            )

    def _without_parts(self, place: str, what: str) -> DataError:
        part = "completions" if self.train_on == "completions" else "assistant's turns"
        return DataError(
            f"{place}: train_on: {self.train_on}, but {what} {part}",
            allowed="assistant for messages; completions for messages or prompt and completion; all for everything",
            fix="leave train_on out: each shape then has its own labels",
        )


def _characters(document: RawDocument) -> int:
    """Return about how many characters of a document go through the tokenizer."""
    match document:
        case ShortText(text=text):
            return len(text)
        case PromptCompletion(prompt=prompt, completion=completion):
            return len(prompt) + len(completion)
        case Conversation(messages=messages):
            return sum(len(str(message.get("content"))) for message in messages)
        case TokenIds(ids=ids):
            return len(ids)


def content_digest(content: Any) -> bytes:
    """Return the hash [8 bytes] of a document's content, from JSON values; a plain text's is that of its UTF-8."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=8).digest()


def _prepared(
    place: str,
    text: RenderedText | None,
    *,
    content: bytes,
    ids: list[int] | None = None,
    counted: list[bool] | None = None,
    is_chat: bool = False,
    ends: bool = True,
) -> Prepared:
    return Prepared(text, ids or [], counted, content, is_chat, ends, place)


def _added_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer's own post-processor puts before a text."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])[:PROBES]
    special = set(tokenizer.all_special_tokens)
    whole: Any = []
    inner: Any = []
    for text in ("x", "a", "0", *(word for word, _ in words if word not in special)):
        # A tokenizer may have no token for a text, or raise, and then nothing shows what is in front of it.
        with suppress(Exception):
            whole, inner = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
        if inner:
            break
    for at in range(len(whole) - len(inner) + 1 if inner else 0):
        if whole[at : at + len(inner)] == inner:
            return list(whole[:at])
    raise DataError(
        "the tokenizer changes a text when it adds special tokens, so its bos token cannot be found",
        found=f"{inner} becomes {whole}",
        fix="another tokenizer: teacher: {tokenizer: …}",
    )
