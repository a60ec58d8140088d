"""Split of documents into training and held-out text by a hash of their content."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy

from xarch_kd.data.documents import TokenizedDocuments


def split_documents(
    documents: TokenizedDocuments, held_out: float, *, seed: int
) -> tuple[TokenizedDocuments, TokenizedDocuments | None]:
    """Return the training documents and the held-out ones, None if there are none.

    A document is held out if the hash of its content and of `seed` is among the lowest `held_out` of all hashes, so it
    stays on its side when documents are added, and equal documents are on one side. If that holds out no document, the
    lowest hash is held out; if it leaves no document to train on, the highest is trained on. A single document is cut
    in two at that share of its tokens instead. With `held_out` 0, or copies of one document, nothing is held out.

    >>> from xarch_kd.data.documents import TokenizedDocuments
    >>> documents = TokenizedDocuments.of([[number] for number in range(1000)])
    >>> training, held_out = split_documents(documents, 0.1, seed=0)
    >>> len(training) + len(held_out), 80 < len(held_out) < 120
    (1000, True)
    """
    if held_out == 0:
        return documents, None
    if len(documents) == 1:
        return _cut(documents, held_out)
    keys = _mixed(documents.hashes, seed)
    if (keys == keys[0]).all():
        return documents, None
    held = _lowest(keys, held_out)
    if not held.any():
        held = keys == keys.min()
    if held.all():
        held = keys != keys.max()
    return _part(documents, "training", ~held), _part(documents, "held-out", held)


def is_held_out(content: int, held_out: float, *, seed: int) -> bool:
    """Return True if a document of that hash is among the `held_out` share, as `split_documents` chooses it."""
    return bool(_lowest(_mixed(numpy.array([content], dtype=numpy.uint64), seed), held_out)[0])


def _lowest(keys: numpy.ndarray, share: float) -> numpy.ndarray:
    return keys.astype(numpy.float64) < share * 2.0**64


def _mixed(hashes: numpy.ndarray, seed: int) -> numpy.ndarray:
    """Return hashes [documents] (uint64) that depend on the seed: the finalizer of SplitMix64, Steele et al. 2014."""
    salt = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
    mixed = hashes ^ numpy.uint64(salt)
    mixed = (mixed ^ (mixed >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> numpy.uint64(31))


def _part(documents: TokenizedDocuments, which: str, chosen: numpy.ndarray) -> TokenizedDocuments:
    return _named(documents.select(chosen.nonzero()[0]), which, documents)


def _cut(documents: TokenizedDocuments, held_out: float) -> tuple[TokenizedDocuments, TokenizedDocuments | None]:
    length = int(documents.lengths[0])
    at = min(max(1, round(length * (1 - held_out))), length - 1)
    if at < 1:
        return documents, None
    parts = []
    for which, start, stop in (("training", 0, at), ("held-out", at, length)):
        digest = hashlib.sha256(f"{documents.fingerprint} {start} {stop}".encode()).hexdigest()
        lengths, starts = numpy.array([stop - start], dtype=numpy.int64), documents.starts + start
        parts.append(_named(replace(documents, lengths=lengths, starts=starts, fingerprint=digest), which, documents))
    return parts[0], parts[1]


def _named(part: TokenizedDocuments, which: str, whole: TokenizedDocuments) -> TokenizedDocuments:
    return replace(part, name=f"{whole.name} ({which})", description=f"{which} part of {whole.description}")
