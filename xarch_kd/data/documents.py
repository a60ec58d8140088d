"""Documents as token ids, in one flat array that may be larger than memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy

from xarch_kd.errors import UsageError


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TokenizedDocuments:
    """Documents as token ids; of a corpus on disk, memory holds 24 bytes per document and no token.

    `name` is short, for messages and tables; `description` is one line. `lengths` [documents] (int64) count the tokens
    of each document with its bos and eos tokens. `hashes` [documents] (uint64) are hashes of the raw content (a text, a
    conversation), by which a held-out split is drawn. `fingerprint` is a SHA-256 over ids and labels in order.

    `flat_ids` [tokens] (an unsigned integer type) and `flat_counted` [tokens] (bool) hold all documents of the store,
    usually as memory maps; `starts` [documents] (int64) are the positions there at which the documents begin.

    >>> from xarch_kd.data.documents import TokenizedDocuments
    >>> documents = TokenizedDocuments.of([[5, 6, 7], [8, 9]], counted=[[False, True, True], [False, True]])
    >>> documents
    TokenizedDocuments(in memory: 2 documents, 5 tokens, 3 are counted)
    >>> documents.select([1]).ids(0).tolist(), documents.counted(0).tolist()
    ([8, 9], [False, True, True])
    """

    name: str
    description: str
    lengths: numpy.ndarray
    hashes: numpy.ndarray
    fingerprint: str
    flat_ids: numpy.ndarray
    flat_counted: numpy.ndarray | None
    starts: numpy.ndarray

    def __repr__(self) -> str:
        counted = ""
        if self.has_labels:
            counted = f", {sum(int(self._counted(number).sum()) for number in range(len(self))):,} are counted"
        return f"TokenizedDocuments({self.name}: {len(self):,} documents, {self.tokens:,} tokens{counted})"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents."""
        return int(self.lengths.sum())

    @property
    def has_labels(self) -> bool:
        """True where labels leave out some tokens of the store; `counted` then returns an array."""
        return self.flat_counted is not None

    def ids(self, document: int) -> numpy.ndarray:
        """Return the token ids [length] of one document, as a view of the store."""
        start = self.starts[document]
        return self.flat_ids[start : start + self.lengths[document]]

    def counted(self, document: int) -> numpy.ndarray | None:
        """Return which tokens [length] (bool) of one document are to be predicted; None for all."""
        return self._counted(document) if self.has_labels else None

    def select(self, documents: Sequence[int] | numpy.ndarray) -> TokenizedDocuments:
        """Return the documents at these positions, in this order, of the same store."""
        chosen = numpy.asarray(documents, dtype=numpy.int64)
        digest = hashlib.sha256(self.fingerprint.encode() + chosen.tobytes())
        return replace(
            self,
            lengths=self.lengths[chosen],
            hashes=self.hashes[chosen],
            starts=self.starts[chosen],
            fingerprint=digest.hexdigest(),
        )

    def _counted(self, document: int) -> numpy.ndarray:
        assert self.flat_counted is not None
        start = self.starts[document]
        return self.flat_counted[start : start + self.lengths[document]]

    @classmethod
    def of(
        cls,
        ids: Sequence[Sequence[int]],
        counted: Sequence[Sequence[bool]] | None = None,
        *,
        name: str = "in memory",
        description: str | None = None,
    ) -> TokenizedDocuments:
        """Return documents of token ids that are in memory.

        `counted` has, for each token, whether it is to be predicted. Raises UsageError for an empty document, an id
        below 0, or another number of values in `counted` than in `ids`.
        """
        lengths = numpy.array([len(document) for document in ids], dtype=numpy.int64)
        if not len(lengths) or not lengths.all():
            raise UsageError("documents need at least one token each", found=f"lengths {lengths.tolist()}")
        if counted is not None and [len(document) for document in counted] != lengths.tolist():
            raise UsageError("counted does not fit ids", found=f"{len(counted)} documents", allowed="one value per id")
        flat = numpy.concatenate([numpy.asarray(document, dtype=numpy.int64) for document in ids])
        if flat.min() < 0 or flat.max() >= 2**32:
            raise UsageError("token ids do not fit", found=int(flat.min()), allowed="0 to 2**32 - 1")
        flat = flat.astype(numpy.uint32)
        mask = None if counted is None else numpy.concatenate([numpy.asarray(part, dtype=bool) for part in counted])
        starts = numpy.cumsum(lengths) - lengths
        hashes = [
            content_hash(flat[start : start + length].tobytes()) for start, length in zip(starts, lengths, strict=True)
        ]
        ordered = OrderedHash()
        ordered.add(flat, numpy.ones(len(flat), dtype=bool) if mask is None else mask)
        return cls(
            name=name,
            description=description or f"{len(lengths)} documents in memory",
            lengths=lengths,
            hashes=numpy.array(hashes, dtype=numpy.uint64),
            fingerprint=ordered.fingerprint(lengths, has_labels=mask is not None),
            flat_ids=flat,
            flat_counted=mask,
            starts=starts,
        )


class OrderedHash:
    """SHA-256 over ids and labels of documents in order, which are added in parts."""

    def __init__(self) -> None:
        self._ids, self._counted = hashlib.sha256(), hashlib.sha256()

    def add(self, ids: numpy.ndarray, counted: numpy.ndarray) -> None:
        """Add tokens, and which of them are to be predicted (bool)."""
        self._ids.update(ids.astype(numpy.uint32).tobytes())
        self._counted.update(counted.tobytes())

    def fingerprint(self, lengths: numpy.ndarray, *, has_labels: bool) -> str:
        """Return the hash of what was added, as documents of these lengths."""
        whole = hashlib.sha256(lengths.tobytes() + self._ids.digest())
        if has_labels:
            whole.update(self._counted.digest())
        return whole.hexdigest()


def content_hash(content: bytes) -> int:
    """Return the 64-bit hash of a document's raw content by which it is put on one side of a split."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
