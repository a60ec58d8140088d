"""Generated text that is only predicted well by recall: lists that are repeated, and values asked for by their keys."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Collection
from typing import Final

import numpy

# Items of a list, at least and at most.
SHORTEST, LONGEST = 12, 40
REPETITIONS: Final = 3
# One document in so many has pairs of key and value.
PAIRS_EVERY: Final = 4
SEPARATORS: Final = (" ", "\n", ", ", "; ", " | ")
COMMON: Final = (
    "the a of and to in is that for it as with on by this be are from at or an which one has have not but all they "
    "each other first last new old long short small large part place name number line word list order value time day "
    "year house water light road field river stone paper glass people work hand side end way before after between "
    "under over again then there where when while often never read write find keep give take make turn hold"
)
WORDS: Final = tuple(COMMON.split())


def copy_documents(count: int, seed: int) -> tuple[str, ...]:
    """Return `count` documents of random identifiers, which follow from `seed` and from no other text.

    Most have 12 to 40 identifiers, filler, the same identifiers, filler, and the same once more. Every fourth has
    pairs of a key and a value instead, and then the keys in another order, each with its value.

    >>> from xarch_kd.data.copying import copy_documents
    >>> documents = copy_documents(8, seed=0)
    >>> len(documents), documents == copy_documents(8, seed=0), documents == copy_documents(8, seed=1)
    (8, True, False)
    """
    draw = random.Random(f"copy {seed}")
    return tuple((_pairs if number % PAIRS_EVERY == 3 else _lists)(draw) for number in range(count))


def _lists(draw: random.Random) -> str:
    items = draw.choice(SEPARATORS).join(_identifiers(draw, draw.randint(SHORTEST, LONGEST)))
    parts = [items]
    for _ in range(REPETITIONS - 1):
        parts += [filler_text(draw, draw.randint(8, 48)), items]
    return "\n\n".join(parts) + "\n"


def _pairs(draw: random.Random) -> str:
    count = draw.randint(SHORTEST, LONGEST)
    keys, values = _identifiers(draw, count), _identifiers(draw, count)
    between = draw.choice((": ", " = ", " -> "))
    lines = [f"{key}{between}{value}" for key, value in zip(keys, values, strict=True)]
    again = draw.sample(lines, count)
    return "\n".join(lines) + f"\n\n{filler_text(draw, draw.randint(8, 48))}\n\n" + "\n".join(again) + "\n"


def _identifiers(draw: random.Random, count: int) -> list[str]:
    """Return different identifiers, all of one style."""
    style = draw.choice(STYLES)
    found: dict[str, None] = {}
    while len(found) < count:
        found[style(draw)] = None
    return list(found)


def _letters(draw: random.Random, least: int, most: int) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(least, most)))


def _snake(draw: random.Random) -> str:
    return "_".join(_letters(draw, 2, 5) for _ in range(draw.randint(1, 2)))


def _camel(draw: random.Random) -> str:
    return "".join(_letters(draw, 2, 5).capitalize() for _ in range(draw.randint(1, 2)))


def _mixed(draw: random.Random) -> str:
    return draw.choice(string.ascii_letters) + "".join(draw.choices(string.ascii_letters + string.digits, k=5))


def _numbered(draw: random.Random) -> str:
    return f"{draw.choice(WORDS)}{draw.randint(0, 999)}"


def _words(draw: random.Random) -> str:
    return f"{draw.choice(WORDS)}-{draw.choice(WORDS)}"


STYLES: Final[tuple[Callable[[random.Random], str], ...]] = (_snake, _camel, _mixed, _numbered, _words)


def filler_text(draw: random.Random, words: int) -> str:
    """Return sentences of `words` random common words in all."""
    sentences, left = [], words
    while left > 0:
        length = min(left, draw.randint(5, 12))
        sentences.append(" ".join(draw.choices(WORDS, k=length)).capitalize() + ".")
        left -= length
    return " ".join(sentences)


def copy_rows(
    vocabulary: int, filler: list[int], *, rows: int, items: int, excluded: Collection[int] = (), seed: int = 0
) -> numpy.ndarray:
    """Return rows [rows, items + filler + items] (int64) of random token ids, the filler, and the same ids again.

    The ids of a row differ, and none is in `excluded` (special tokens).

    >>> from xarch_kd.data.copying import copy_rows
    >>> copy_rows(9, [7, 7], rows=1, items=3, excluded=[7], seed=0).shape
    (1, 8)
    """
    allowed = numpy.setdiff1d(numpy.arange(vocabulary), numpy.array(sorted(excluded), dtype=numpy.int64))
    draw = numpy.random.Generator(numpy.random.PCG64(seed))
    lists = numpy.stack([draw.choice(allowed, size=items, replace=False) for _ in range(rows)])
    between = numpy.broadcast_to(numpy.array(filler, dtype=numpy.int64), (rows, len(filler)))
    return numpy.concatenate([lists, between, lists], axis=1)
