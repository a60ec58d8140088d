"""Calls of the tokenizer for texts of every length: long ones in overlapping windows whose tokens meet."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.chat import RenderedText
from xarch_kd.data.shapes import PlainText
from xarch_kd.errors import DataError

# Characters of a text that is tokenized in one call; the tokenizer needs about 100 bytes per token for it.
LONGEST_CALL: Final = 2**20
# Characters of a window of a longer text, and windows in one call.
WINDOW: Final = 2**17
WINDOWS: Final = 4
# Characters of a text with labels, which is tokenized in one call.
LONGEST_LABELLED: Final = 2**23
# Characters of a text that are hashed and joined at once.
PIECE: Final = 2**18
# Characters that two windows share.
OVERLAP: Final = 2**12
# Tokens on both sides of the place where two windows meet, which must be the same in both.
SAME: Final = 8


def encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[RenderedText]
) -> Iterator[tuple[list[int], numpy.ndarray | None]]:
    """Yield the token ids of each text, and which of them have a character in its spans (None: all)."""
    for text in texts:
        if text.spans is not None and len(text.text) > LONGEST_LABELLED:
            raise DataError(
                f"{text.place}: a document that is too long for labels of a part of it",
                found=f"{len(text.text):,} characters",
                allowed=f"at most {LONGEST_LABELLED:,} characters",
                fix="split it, or train_on: all",
            )
    with_spans = any(text.spans is not None for text in texts)
    if with_spans and not tokenizer.is_fast:
        raise DataError(
            "labels for a part of a text need a fast tokenizer",
            found=type(tokenizer).__name__,
            fix="train_on: all, or a model with a tokenizer.json",
        )
    found: Any = tokenizer(
        [text.text for text in texts],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=with_spans,
        # A document longer than the model's context is expected here, since rows are cut afterwards.
        verbose=False,
    )
    for number, text in enumerate(texts):
        ids = found["input_ids"][number]
        counted = None if text.spans is None else _inside(text.spans, found["offset_mapping"][number])
        yield ids, counted


def _inside(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> numpy.ndarray:
    """Return which tokens [tokens] (bool) have a character in one of the spans."""
    starts, ends = numpy.array(offsets, dtype=numpy.int64).reshape(-1, 2).T
    counted = numpy.zeros(len(starts), dtype=bool)
    for start, end in spans:
        counted |= (starts < end) & (ends > start) & (ends > starts)
    return counted


class LongText:
    """A text of which `start` is held: all of it if `is_short`, or the rest is still to be read.

    No more of a text is read than one call of the tokenizer takes. `digest` is the hash [8 bytes] of the whole content,
    known when all of it was read.
    """

    def __init__(self, document: PlainText) -> None:
        self.place = document.place
        self._rest = _in_pieces(document.pieces)
        self._hash = hashlib.blake2b(digest_size=8)
        self.start = self._more(LONGEST_CALL)
        following = next(self._rest, None)
        self.is_short = following is None
        if following is not None:
            self._rest = itertools.chain((following,), self._rest)

    @property
    def digest(self) -> bytes:
        """Hash of what was read so far."""
        return self._hash.digest()

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[numpy.ndarray]:
        """Yield the token ids of the whole text in parts, the same as of one call.

        Each window of the text begins before the end of the window before it. The tokens of both are joined where they
        are the same: a tokenizer's choice depends on few characters around a token. Raises DataError where they are
        nowhere the same, as for a text without a blank. A tokenizer without offsets gets the whole text at once.
        """
        if not tokenizer.is_fast:
            whole = self.start + "".join(iter(lambda: self._more(LONGEST_CALL), ""))
            yield numpy.array(next(encoded(tokenizer, [RenderedText(self.place, whole)]))[0], dtype=numpy.int64)
            return
        before: tuple[numpy.ndarray, numpy.ndarray] | None = None
        for windows in _groups(self._windows(), WINDOWS):
            for offset, ids, starts in _tokens(tokenizer, windows):
                if before is not None:
                    ids, starts, ready = self._joined(before, ids, starts, offset)
                    yield ready
                before = ids, starts
        if before is not None:
            yield before[0]

    def _windows(self) -> Iterator[tuple[str, int]]:
        """Yield the windows of the text, with the number of characters before each."""
        held, offset = "", 0
        for more in itertools.chain((self.start,), iter(lambda: self._more(WINDOW), "")):
            held += more
            while len(held) > WINDOW:
                yield held[:WINDOW], offset
                held, offset = held[WINDOW - OVERLAP :], offset + WINDOW - OVERLAP
        yield held, offset

    def _more(self, characters: int) -> str:
        """Return the next characters of the text, at least so many if there are."""
        parts, size = [], 0
        while size < characters and (piece := next(self._rest, None)) is not None:
            self._hash.update(piece.encode())
            parts.append(piece)
            size += len(piece)
        return "".join(parts)

    def _joined(
        self,
        before: tuple[numpy.ndarray, numpy.ndarray],
        ids: numpy.ndarray,
        starts: numpy.ndarray,
        offset: int,
    ) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Return ids and starts from the place on where two windows meet, and the ids of the first before it."""
        first_ids, first_starts = before
        margin = OVERLAP // 4
        low = numpy.searchsorted(first_starts, offset + margin)
        high = numpy.searchsorted(first_starts, offset + OVERLAP - margin)
        for at in range(max(low, SAME), min(high, len(first_ids) - SAME)):
            if first_starts[at] == first_starts[at - 1]:
                continue
            other = int(numpy.searchsorted(starts, first_starts[at]))
            same = slice(other - SAME, other + SAME), slice(at - SAME, at + SAME)
            if other < SAME or other + SAME > len(ids):
                continue
            if (ids[same[0]] == first_ids[same[1]]).all() and (starts[same[0]] == first_starts[same[1]]).all():
                return ids[other:], starts[other:], first_ids[:at]
        raise DataError(
            f"{self.place}: a text of more than {LONGEST_CALL:,} characters that cannot be tokenized in windows",
            found=f"no common tokens after {offset:,} characters, as in a text without blanks",
            fix="split it into documents, or leave it out",
        )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, windows: Sequence[tuple[str, int]]
) -> Iterator[tuple[int, numpy.ndarray, numpy.ndarray]]:
    """Yield, for each window, the characters before it, its token ids, and where each starts in the whole text."""
    found: Any = tokenizer(
        [window for window, _ in windows],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for number, (_, offset) in enumerate(windows):
        starts = numpy.array(found["offset_mapping"][number], dtype=numpy.int64).reshape(-1, 2)[:, 0] + offset
        yield offset, numpy.array(found["input_ids"][number], dtype=numpy.int64), starts


def _groups(windows: Iterator[tuple[str, int]], size: int) -> Iterator[list[tuple[str, int]]]:
    while group := list(itertools.islice(windows, size)):
        yield group


def _in_pieces(pieces: Iterable[str]) -> Iterator[str]:
    for piece in pieces:
        for start in range(0, len(piece), PIECE):
            yield piece[start : start + PIECE]
