"""Rows of tokens that training, calibration and evaluation read, and the source that draws a stage's batches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy
import torch

from xarch_kd.data.batches import Batch
from xarch_kd.errors import CheckpointError

# Batches of documents of unequal length that are drawn together and sorted by length.
WINDOW_BATCHES: Final = 32
# Draws after which a mixture has drawn each source in proportion, at least.
BLOCK_DRAWS: Final = 1000


class Rows(Protocol):
    """Rows of at most `sequence_length` tokens, numbered from 0.

    `tokens` counts the tokens of all rows, `fingerprint` is a SHA-256 of all of them in order. Rows come from one
    source or several: `sizes` are the rows of each source, in the order of their numbers, and `weights` the share of
    the rows drawn from each. `lengths` [rows] are the tokens of each row where batches are drawn by length, else
    None; `notices` are lines about what packing left out.
    """

    @property
    def sequence_length(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def weights(self) -> tuple[float, ...]: ...

    @property
    def lengths(self) -> numpy.ndarray | None: ...

    @property
    def notices(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int], *, origin: str) -> Batch:
        """Return rows by their numbers as a batch, padded on the right where they differ in length."""
        ...

    def hashes(self, rows: Sequence[int]) -> set[int]:
        """Return the hashes of the documents that rows have a part of."""
        ...


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Some of the rows, read batch by batch."""

    rows: Rows
    chosen: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def tokens(self) -> int:
        """Number of tokens, exact where all rows have the same."""
        return round(len(self.chosen) * self.rows.tokens / len(self.rows))

    def batches(self, size: int, *, origin: str) -> Iterator[Batch]:
        """Yield the rows in batches of `size`."""
        for start in range(0, len(self.chosen), size):
            yield self.rows.batch(self.chosen[start : start + size], origin=origin)


def rows_of_tokens(rows: Rows, tokens: int) -> int:
    """Return the number of rows that have about `tokens` tokens, at least 1."""
    return max(1, math.ceil(tokens * len(rows) / rows.tokens))


def select_rows(rows: Rows, count: int, *, seed: int, from_end: bool = False) -> Selection:
    """Return `count` rows, or all if there are fewer, in the order that the seed gives; of a mixture, by its weights.

    The last rows of that order with `from_end`: with enough text they are other rows than the first ones.
    """
    chosen: list[int] = []
    first = 0
    for size, share in zip(rows.sizes, _apportioned(rows.weights, count), strict=True):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        own = order[max(0, size - share) :] if from_end else order[:share]
        chosen += (own + first).tolist()
        first += size
    return Selection(rows=rows, chosen=tuple(chosen))


def first_rows(rows: Rows, count: int) -> Selection:
    """Return the first `count` rows, or all if there are fewer; of a mixture, the first of each source by weight."""
    chosen: list[int] = []
    first = 0
    for size, share in zip(rows.sizes, _apportioned(rows.weights, count), strict=True):
        chosen += range(first, first + min(size, share))
        first += size
    return Selection(rows=rows, chosen=tuple(chosen))


def _apportioned(weights: Sequence[float], count: int) -> list[int]:
    """Return how many of `count` draws each source has: differences of the rounded sums of the shares before it."""
    total = sum(Fraction(str(weight)) for weight in weights)
    bounds = [0]
    passed = Fraction(0)
    for weight in weights:
        passed += Fraction(str(weight)) / total
        bounds.append(math.floor(passed * count + Fraction(1, 2)))
    return [after - before for before, after in pairwise(bounds)]


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Rows of each micro-batch of a stage, a pure function of (seed, stage, index).

    The stage draws `distinct` batches of `batch_size` rows; pass 0 goes over them in order and each later pass in a
    new order. The rows of each source are reshuffled endlessly. Of several sources each is drawn by its weight: exactly
    so in each block of 1000 draws or more, in a random order inside the block.
    """

    sizes: tuple[int, ...]
    batch_size: int
    distinct: int
    seed: int
    stage: int
    weights: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, rows: Rows, *, batch_size: int, distinct: int, seed: int, stage: int) -> BatchOrder:
        """Return the order in which a stage draws from `rows`."""
        return cls(
            sizes=rows.sizes, weights=rows.weights, batch_size=batch_size, distinct=distinct, seed=seed, stage=stage
        )

    def batch(self, index: int) -> int:
        """Return the number (0 to `distinct` - 1) of the batch that micro-batch `index` of the stage uses."""
        turn, place = divmod(index, self.distinct)
        return place if turn == 0 else int(permutation(self.distinct, (self.seed, self.stage, 1, turn))[place])

    def row(self, draw: int) -> int:
        """Return the row of draw `draw` of the stage, which batch `draw // batch_size` has."""
        source, own = self._source(draw)
        size = self.sizes[source]
        epoch, position = divmod(own, size)
        key = (self.seed, self.stage, 2 * source, epoch)
        return sum(self.sizes[:source]) + int(permutation(size, key)[position])

    def rows(self, batch: int, lengths: numpy.ndarray | None = None) -> list[int]:
        """Return the rows of batch `batch`.

        With the `lengths` [rows] of rows, batches hold rows of similar length: those of 32 batches are sorted by it.
        """
        if lengths is None:
            return [self.row(batch * self.batch_size + place) for place in range(self.batch_size)]
        window, place = divmod(batch, WINDOW_BATCHES)
        first = window * WINDOW_BATCHES
        batches = min(WINDOW_BATCHES, self.distinct - first)
        drawn = [self.row(first * self.batch_size + draw) for draw in range(batches * self.batch_size)]
        drawn.sort(key=lambda row: int(lengths[row]))
        at = int(permutation(batches, (self.seed, self.stage, 3, window))[place]) * self.batch_size
        return drawn[at : at + self.batch_size]

    def drawn(self) -> list[int]:
        """Return how many rows of each source the distinct batches of the stage have, repeated ones included."""
        draws = self.distinct * self.batch_size
        blocks, rest = divmod(draws, self._block)
        counts = self._counts(blocks * self._block)
        if rest:
            inside = self._sources(blocks)[:rest]
            counts = [count + int((inside == source).sum()) for source, count in enumerate(counts)]
        return counts

    @cached_property
    def _block(self) -> int:
        # With two draws or more of the rarest source in a block, no rounding leaves a block with fewer than none.
        rarest = min(self.weights) / sum(self.weights)
        return max(BLOCK_DRAWS, math.ceil(2 / rarest))

    def _counts(self, draws: int) -> list[int]:
        return _apportioned(self.weights, draws)

    def source(self, draw: int) -> int:
        """Return the source of draw `draw` of the stage, 0 where there is one."""
        return self._source(draw)[0]

    def _source(self, draw: int) -> tuple[int, int]:
        """Return the source of a draw, and which draw of that source it is."""
        if len(self.sizes) == 1:
            return 0, draw
        block, place = divmod(draw, self._block)
        sources = self._sources(block)
        source = int(sources[place])
        return source, self._counts(block * self._block)[source] + int((sources[:place] == source).sum())

    def _sources(self, block: int) -> numpy.ndarray:
        before, after = (self._counts(number * self._block) for number in (block, block + 1))
        own = numpy.repeat(
            numpy.arange(len(self.sizes)), [last - first for first, last in zip(before, after, strict=True)]
        )
        return own[permutation(self._block, (self.seed, self.stage, 5, block))]


@lru_cache(maxsize=16)
def permutation(count: int, key: tuple[int, ...]) -> numpy.ndarray:
    """Return the numbers from 0 to `count` - 1 in the random order that `key` gives."""
    mixed = 0
    for part in key:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63)
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed)).numpy()


class StageRows:
    """Batch source of a stage: rows in the order of `order`.

    Its state is the number of micro-batches drawn, with the order and the fingerprint of the rows to recognize them by.
    """

    def __init__(self, rows: Rows, order: BatchOrder) -> None:
        self.rows = rows
        self.order = order
        self.drawn = 0

    def draw(self) -> Batch:
        """Return the next micro-batch of the stage."""
        number = self.order.batch(self.drawn)
        self.drawn += 1
        return self.rows.batch(self.order.rows(number, self.rows.lengths), origin=f"batch {number}")

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"drawn": self.drawn, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the micro-batches that `state` counts. Raises CheckpointError for other rows or another order."""
        for name, own in self._identity.items():
            if state.get(name) != own:
                raise CheckpointError(
                    "the checkpoint was trained on other batches than this stage draws",
                    asked=f"{name} {own}",
                    found=state.get(name),
                    fix="restore the text, the tokenizer and the mapping file of the run, or give another --output",
                )
        self.drawn = int(state["drawn"])

    @cached_property
    def _identity(self) -> dict[str, Any]:
        # As JSON returns it: with lists for tuples.
        return json.loads(json.dumps({"order": asdict(self.order), "rows": self.rows.fingerprint}))
