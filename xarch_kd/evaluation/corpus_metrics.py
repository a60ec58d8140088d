"""Measures of repetition and diversity of a set of equally long texts, given as token ids."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ids = NDArray[np.int64]
ORDERS: Final = (1, 2, 3, 4)
# Of the hashed n-grams that a text's features count.
FEATURES: Final = 512
FEATURE_ORDERS: Final = (1, 2, 3)


class Corpus:
    """Texts [texts, tokens] of one length, with the n-grams of each order as numbers that stand for them.

    Numbers are those of this corpus alone. Raises ValueError for texts of fewer tokens than an n-gram.
    """

    def __init__(self, texts: Ids, vocabulary: int) -> None:
        if texts.ndim != 2 or texts.shape[1] < ORDERS[-1]:
            raise ValueError(f"texts of at least {ORDERS[-1]} tokens are needed, found {list(texts.shape)}")
        self.texts, self.vocabulary = texts, vocabulary
        self.grams: dict[int, Ids] = {}
        previous = np.unique(texts, return_inverse=True)[1].reshape(texts.shape).astype(np.int64)
        tokens = int(previous.max()) + 1
        single = previous
        for order in ORDERS:
            if order > 1:
                pairs = previous[:, :-1] * tokens + single[:, order - 1 :]
                previous = np.unique(pairs, return_inverse=True)[1].reshape(pairs.shape).astype(np.int64)
            self.grams[order] = previous

    @functools.cached_property
    def vectors(self) -> Array:
        """The features of each text."""
        return features(self.texts)

    def within_repetition(self, order: int = 4) -> Array:
        """Return 1 - different n-grams / n-grams of each text [texts] (seq-rep-n; Welleck et al., arXiv 1908.04319)."""
        ordered = np.sort(self.grams[order], 1)
        different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
        return 1 - different / ordered.shape[1]


def distinct(corpus: Corpus, index: Ids, order: int) -> float:
    """Return the share of different n-grams among those of the texts `index`.

    This is distinct-n (Li et al., arXiv 1510.03055).
    """
    grams = corpus.grams[order][index]
    return len(np.unique(grams)) / grams.size


def adjusted_distinct(corpus: Corpus, index: Ids) -> float:
    """Return the number of different tokens over that of as many uniform draws (EAD; Liu et al., arXiv 2202.13587)."""
    grams, size = corpus.grams[1][index], corpus.vocabulary
    return len(np.unique(grams)) / (size * -np.expm1(grams.size * np.log1p(-1 / size)))


def entropy(corpus: Corpus, index: Ids, order: int) -> float:
    """Return the entropy of n-grams in nats, with the correction of Miller and Madow, (kinds - 1) / (2 n-grams)."""
    counts = np.unique(corpus.grams[order][index], return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * counts.sum()))


def different_texts(corpus: Corpus, index: Ids) -> float:
    """Return the share of texts that differ from all others."""
    return len(np.unique(corpus.texts[index], axis=0)) / len(index)


def _counts(grams: Ids) -> tuple[Ids, Ids, Ids, int]:
    """Return text, n-gram and count of each n-gram of each text [k], and the number of different n-grams."""
    kinds, codes = np.unique(grams, return_inverse=True)
    pairs = np.arange(len(grams))[:, None] * len(kinds) + codes.reshape(grams.shape)
    found, counts = np.unique(pairs, return_counts=True)
    return found // len(kinds), found % len(kinds), counts, len(kinds)


def self_repetition(corpus: Corpus, index: Ids, order: int = 4) -> float:
    """Return the mean over texts of log(1 + occurrences of the text's n-grams in other texts).

    Salkar et al., arXiv 2210.02891 (self-repetition score).
    """
    texts, grams, counts, kinds = _counts(corpus.grams[order][index])
    total = np.bincount(grams, weights=counts, minlength=kinds)
    elsewhere = np.bincount(texts, weights=total[grams] - counts, minlength=len(index))
    return float(np.log1p(elsewhere).mean())


def self_bleu(corpus: Corpus, index: Ids) -> float:
    """Return the mean BLEU of each text with all others as its references, from 0 to 1 (Zhu et al., arXiv 1802.01886).

    Orders 1 to 4; the k-th order of a text without a match counts as 1 / (2^k n-grams), as in sacrebleu. All texts have
    one length, so there is no brevity penalty.
    """
    precisions = []
    for order in ORDERS:
        texts, grams, counts, kinds = _counts(corpus.grams[order][index])
        first = np.zeros(kinds, dtype=np.int64)
        np.maximum.at(first, grams, counts)
        # The largest count in another text: that of the second text, where this one has the largest.
        is_largest = counts == first[grams]
        holders = np.bincount(grams[is_largest], minlength=kinds)
        second = np.zeros(kinds, dtype=np.int64)
        np.maximum.at(second, grams[~is_largest], counts[~is_largest])
        others = np.where(is_largest & (holders[grams] == 1), second[grams], first[grams])
        matched = np.bincount(texts, weights=np.minimum(counts, others), minlength=len(index))
        precisions.append(matched / (corpus.texts.shape[1] - order + 1))
    shares = np.stack(precisions)
    missing = (shares == 0).cumsum(0)
    totals = corpus.texts.shape[1] - np.array(ORDERS)[:, None] + 1
    smoothed = np.where(shares == 0, 1 / (2.0**missing * totals), shares)
    return float(np.exp(np.log(smoothed).mean(0)).mean())


def features(texts: Ids) -> Array:
    """Return unit vectors [texts, features] of hashed n-grams of orders 1 to 3, each count as its square root.

    They come from no model, so none is nearer to them than another.
    """
    found = np.zeros((len(texts), FEATURES))
    rows = np.arange(len(texts))[:, None]
    code = np.zeros_like(texts, dtype=np.uint64)
    for order in FEATURE_ORDERS:
        width = texts.shape[1] - order + 1
        code = (code[:, :width] * np.uint64(0x9E3779B97F4A7C15)) ^ (
            texts[:, order - 1 :].astype(np.uint64) + np.uint64(1)
        )
        mixed = (code ^ (code >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        place = (mixed >> np.uint64(40)) % np.uint64(FEATURES)
        np.add.at(found, (rows, place.astype(np.int64)), 1.0)
    found = np.sqrt(found)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def vendi(vectors: Array) -> float:
    """Return the effective number of different texts: exp of the entropy of the eigenvalues of K / texts.

    K are the cosine similarities of `vectors` [texts, features] (Friedman and Dieng, arXiv 2210.02410).
    """
    values = np.linalg.eigvalsh(vectors @ vectors.T / len(vectors))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


MEASURES: Final[dict[str, Callable[[Corpus, Ids], float]]] = {
    "distinct-1": lambda corpus, index: distinct(corpus, index, 1),
    "distinct-2": lambda corpus, index: distinct(corpus, index, 2),
    "distinct-4": lambda corpus, index: distinct(corpus, index, 4),
    "distinct-1, expectation-adjusted": adjusted_distinct,
    "entropy of tokens": lambda corpus, index: entropy(corpus, index, 1),
    "entropy of 2-grams": lambda corpus, index: entropy(corpus, index, 2),
    "different texts": different_texts,
    "repetition within texts (4-grams)": lambda corpus, index: float(corpus.within_repetition()[index].mean()),
    "repetition across texts (4-grams)": self_repetition,
    "self-BLEU": self_bleu,
    "Vendi score": lambda corpus, index: vendi(corpus.vectors[index]),
}
# Where 0 is common, so that there is no ratio.
DIFFERENCES: Final = ("repetition within texts (4-grams)", "repetition across texts (4-grams)", "self-BLEU")
