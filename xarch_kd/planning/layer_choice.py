"""Choice of the blocks that keep attention by a strategy: budgets, guards, and measured results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy

from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.mapping_file.layer_choice import CacheBudget, LayerStrategy, Metric

Key = Literal["keep_attention", "replace"]


@dataclass(frozen=True, kw_only=True)
class ScoredLayer:
    """Scores of one block: what the teacher loses when the block alone has a new mixer.

    `kl` is the mean KL divergence per token, in nats; `recall` the rise of the loss per token on text that is to be
    recalled, in nats. `rank` counts from 1, the block that loses most. `gate` is the trained share of its attention, by
    the strategy `gates`.
    """

    layer: int
    kl: float
    recall: float
    rank: int
    kept: bool
    gate: float | None = None


@dataclass(frozen=True, kw_only=True)
class ComparedSet:
    """One choice of layers, all replaced at once without training, measured on other text than it was chosen on.

    `kl` is per token, in nats; `copying` the share of copied tokens that are predicted right. `difference` is its KL
    minus that of the chosen set with the bounds of a paired interval, None for the chosen set itself.
    """

    name: str
    kept: tuple[int, ...]
    kl: float
    copying: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerSelection:
    """Measured choice of the blocks that keep attention.

    `tokens` of training text were read, `teacher_copying` is the teacher's own share of copied tokens that it predicts
    right. `made_for` is the fingerprint of the mapping file. The mixers were trained for `aligned_steps` before.
    """

    strategy: str
    metric: Metric
    kept: tuple[int, ...]
    layers: tuple[ScoredLayer, ...]
    compared: tuple[ComparedSet, ...]
    tokens: int
    seconds: float
    teacher_copying: float
    made_for: str
    aligned_steps: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Any) -> LayerSelection:
        """Return the selection that `as_dict` came from. Raises CheckpointError if `stored` is something else."""
        try:
            return cls(
                **{
                    **stored,
                    "kept": _indices(stored["kept"]),
                    "layers": tuple(ScoredLayer(**layer) for layer in stored["layers"]),
                    "compared": tuple(
                        ComparedSet(**{**one, "kept": _indices(one["kept"])}) for one in stored["compared"]
                    ),
                }
            )
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                "The selection of layers is damaged.", found=f"{type(error).__name__}: {error}"
            ) from None


def kept_count(strategy: LayerStrategy, key: Key, layers: int) -> int:
    """Return how many of `layers` blocks keep their attention.

    Raises UsageError for a budget that leaves nothing to choose, and for guards that it does not fit.
    """
    budget = strategy.budget
    # Bytes are a number of layers since the configs were read (`with_count`).
    assert not isinstance(budget, CacheBudget)
    chosen = budget if isinstance(budget, int) else math.floor(budget * layers + 0.5)
    if not 1 <= chosen < layers:
        instead = "all" if chosen >= layers else "none"
        raise UsageError(
            "A strategy chooses some of the blocks, and this budget leaves nothing to choose.",
            asked=f"{key}: budget {budget}",
            found=f"{chosen} of {layers} blocks",
            allowed=f"1 to {layers - 1} blocks",
            fix=f"change the budget, or write {key}: {instead}",
        )
    for name in ("always", "never"):
        outside = [index for index in getattr(strategy, name) if index >= layers]
        if outside:
            raise UsageError(
                f"{name} has a block that the model lacks.", asked=outside[0], allowed=f"0 to {layers - 1}"
            )
    if len(set(strategy.always)) > chosen or layers - len(set(strategy.never)) < chosen:
        raise UsageError(
            "The budget does not fit always and never.",
            asked=f"{key}: budget {budget}, always {list(strategy.always)}, never {list(strategy.never)}",
            found=f"{chosen} of {layers} blocks to choose",
        )
    return chosen if key == "keep_attention" else layers - chosen


def with_count(strategy: LayerStrategy, key: Key, layers: int, attention: int, recurrent: int) -> LayerStrategy:
    """Return the strategy with a number of layers in place of bytes of cache: as much attention as fits.

    `attention` and `recurrent` are the bytes that a layer of each kind keeps at the context of the budget. Raises
    UsageError where the recurrent states alone do not fit, and where all or no layer could keep its attention.
    """
    budget = strategy.budget
    if not isinstance(budget, CacheBudget):
        return strategy
    sizes = [kept * attention + (layers - kept) * recurrent for kept in range(layers + 1)]
    fitting = [kept for kept, size in enumerate(sizes) if size <= budget.bytes]
    kept = max(fitting, default=0)
    if not 1 <= kept < layers:
        found = "every layer may keep its attention" if kept else "not even one layer of attention fits"
        if sizes[0] > budget.bytes:
            found = f"recurrent states of all layers alone take {sizes[0]:,} bytes"
        raise UsageError(
            "The bytes of cache leave nothing to choose.",
            asked=f"cache_bytes: {budget.cache_bytes} at {budget.at_context:,} tokens",
            found=found,
            allowed=f"{sizes[1]:,} bytes (1 layer of attention) to {sizes[layers - 1]:,} bytes ({layers - 1} layers)",
        )
    return strategy.model_copy(update={"budget": kept if key == "keep_attention" else layers - kept})


def choose_kept(
    strategy: LayerStrategy, key: Key, layers: int, scores: Sequence[float], *, kept: int | None = None
) -> tuple[int, ...]:
    """Return the sorted blocks that keep attention: those of greatest `scores` that the guards allow.

    `scores` has one number per block; equal ones go by index, later blocks first. `kept` is the number of blocks that
    keep attention, by default that of the budget. Raises UsageError where `spacing` leaves too few blocks.
    """
    wanted = kept_count(strategy, key, layers) if kept is None else kept
    certain, excluded = guards(strategy, key)
    chosen = sorted(certain)
    if any(second - first < strategy.spacing for first, second in pairwise(chosen)):
        raise _too_close(strategy, wanted, layers)
    order = sorted(set(range(layers)) - certain - excluded, key=lambda index: (-scores[index], -index))
    for index in order:
        if len(chosen) < wanted and all(abs(index - other) >= strategy.spacing for other in chosen):
            chosen.append(index)
    if len(chosen) < wanted:
        raise _too_close(strategy, wanted, layers)
    return tuple(sorted(chosen))


def uniform_kept(layers: int, kept: int, certain: set[int], excluded: set[int]) -> tuple[int, ...]:
    """Return `kept` blocks at equal distances, `certain` among them and none of `excluded`.

    The blocks besides the certain ones are spaced evenly over those that are free.
    """
    free = [index for index in range(layers) if index not in certain | excluded]
    wanted = kept - len(certain)
    places = [int((number + 0.5) * len(free) / wanted) for number in range(wanted)]
    return tuple(sorted({*certain, *(free[place] for place in places)}))


def random_kept(strategy: LayerStrategy, key: Key, layers: int, kept: int, seed: int) -> tuple[int, ...]:
    """Return `kept` random blocks that the guards allow, the same for the same seed."""
    scores = numpy.random.default_rng(seed).permutation(layers).tolist()
    return choose_kept(strategy, key, layers, scores, kept=kept)


def unmeasured_kept(strategy: LayerStrategy, key: Key, layers: int, *, seed: int) -> tuple[int, ...]:
    """Return the blocks of a strategy without measurements; of the others evenly spaced ones, as a placeholder."""
    kept = kept_count(strategy, key, layers)
    if strategy.strategy == "random":
        return random_kept(strategy, key, layers, kept, seed if strategy.seed is None else strategy.seed)
    return uniform_kept(layers, kept, *guards(strategy, key))


def guards(strategy: LayerStrategy, key: Key) -> tuple[set[int], set[int]]:
    """Return the blocks that certainly keep attention, and those that certainly do not."""
    always, never = set(strategy.always), set(strategy.never)
    return (always, never) if key == "keep_attention" else (never, always)


def ranks(scores: Mapping[str, Sequence[float]], metric: Metric) -> list[float]:
    """Return the score of each block by a metric, higher for one that loses more: `both` is the mean of both ranks."""
    if metric != "both":
        return list(scores[metric])
    orders = [numpy.argsort(numpy.argsort(scores[name], kind="stable"), kind="stable") for name in ("kl", "recall")]
    return ((orders[0] + orders[1]) / 2).tolist()


def _too_close(strategy: LayerStrategy, wanted: int, layers: int) -> UsageError:
    return UsageError(
        "Too few blocks are far enough from each other.",
        asked=f"{wanted} of {layers} blocks at a distance of at least {strategy.spacing}",
        fix="lower spacing, or change always, never or the budget",
    )


def _indices(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int for value in values):
        raise ValueError("a block is not a whole number")
    return tuple(values)
