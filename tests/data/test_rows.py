"""Order of rows, mixtures, and the source that draws a stage's batches."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy
import pytest
import torch

from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.mixture import MixedRows
from xarch_kd.data.packing import PackedRows, pack
from xarch_kd.data.rows import BatchOrder, StageRows, first_rows, select_rows
from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.testing.rows import rows_from


def _order(**changes: Any) -> BatchOrder:
    return BatchOrder(**({"sizes": (10,), "batch_size": 4, "distinct": 6, "seed": 0, "stage": 0} | changes))


def test_each_pass_goes_over_all_distinct_batches_once() -> None:
    order = _order()
    passes = [[order.batch(turn * 6 + place) for place in range(6)] for turn in range(3)]
    assert passes[0] == list(range(6))
    assert all(sorted(batches) == list(range(6)) for batches in passes)
    assert passes[1] != passes[2]


def test_rows_are_reshuffled_each_epoch_and_all_used() -> None:
    order = _order(distinct=5)
    drawn = [order.row(draw) for draw in range(20)]
    assert Counter(drawn) == dict.fromkeys(range(10), 2)
    assert drawn[:10] != drawn[10:]


def test_seed_and_stage_change_the_order() -> None:
    def drawn(order: BatchOrder) -> list[int]:
        return [order.row(draw) for draw in range(8)]

    assert drawn(_order()) == drawn(_order())
    assert drawn(_order()) != drawn(_order(seed=1))
    assert drawn(_order()) != drawn(_order(stage=1))


def _rows(shift: int = 0) -> PackedRows:
    """Return ten rows of 8 tokens, all of them the row's number."""
    return rows_from(torch.arange(10).unsqueeze(1).repeat(1, 8) + shift)


def _source(order: BatchOrder | None = None, shift: int = 0) -> StageRows:
    return StageRows(_rows(shift), order or _order())


def test_batches_come_in_training_order_with_their_number() -> None:
    source, order = _source(), _order()
    drawn = [source.draw() for _ in range(9)]
    for index, batch in enumerate(drawn):
        number = order.batch(index)
        assert batch.origin == f"batch {number}"
        assert batch.input_ids[:, 0].tolist() == [order.row(4 * number + place) for place in range(4)]


def test_a_restored_source_goes_on_with_the_same_batches() -> None:
    first = _source()
    for _ in range(5):
        first.draw()
    second = _source()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(9):
        assert torch.equal(first.draw().input_ids, second.draw().input_ids)


@pytest.mark.parametrize("other", [_source(shift=1), _source(_order(seed=1)), _source(_order(distinct=5))])
def test_the_state_of_other_rows_or_another_order_is_refused(other: StageRows) -> None:
    with pytest.raises(CheckpointError, match="other batches"):
        _source().load_state_dict(other.state_dict())


def test_batches_of_documents_of_unequal_length_hold_similar_ones() -> None:
    lengths = numpy.random.default_rng(0).integers(1, 100, size=300)
    rows = pack(
        TokenizedDocuments.of([[number] * length for number, length in enumerate(lengths)]), 128, packing="none"
    )
    order = BatchOrder.of(rows, batch_size=5, distinct=60, seed=0, stage=0)
    source = StageRows(rows, order)
    batches = [source.draw() for _ in range(60)]
    # One pass has every document once, whole.
    drawn = [row[0] for batch in batches for row in batch.input_ids.tolist()]
    assert sorted(drawn) == list(range(300))
    assert sum(batch.tokens for batch in batches) == lengths.sum()
    padding = sum(batch.input_ids.numel() for batch in batches) - int(lengths.sum())
    by_chance = sum(5 * max(lengths[order.row(5 * batch + place)] for place in range(5)) for batch in range(60))
    assert padding < 0.05 * lengths.sum() < 0.2 * (by_chance - int(lengths.sum()))
    # Short and long batches alternate.
    assert batches[0].time != min(batch.time for batch in batches)


def _mixture(*weights: float, sizes: tuple[int, ...] = (40, 9, 200)) -> MixedRows:
    parts = [rows_from(torch.full((size, 8), number)) for number, size in enumerate(sizes[: len(weights)])]
    return MixedRows(parts=tuple(parts), weights=weights)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (5.0, 1.0, 2.0), (1.0, 0.0004)])
def test_a_mixture_is_drawn_by_weight_and_each_source_without_repetition(weights: tuple[float, ...]) -> None:
    rows = _mixture(*weights)
    order = BatchOrder.of(rows, batch_size=8, distinct=1500, seed=3, stage=0)
    drawn = [row for batch in range(1500) for row in order.rows(batch)]
    ends = numpy.cumsum(rows.sizes)
    sources = numpy.searchsorted(ends, drawn, side="right")
    counts = numpy.bincount(sources, minlength=len(weights))
    assert counts.tolist() == order.drawn()
    for source, weight in enumerate(weights):
        assert abs(counts[source] - 12_000 * weight / sum(weights)) <= 2 + 0.01 * counts[source]
        own = [row for row, found in zip(drawn, sources, strict=True) if found == source]
        size = rows.sizes[source]
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size
    # Sources are mixed, not one after another.
    assert set(sources[:64].tolist()) >= {source for source, weight in enumerate(weights) if weight > 0.1}
    assert order.rows(700) == BatchOrder.of(rows, batch_size=8, distinct=1500, seed=3, stage=0).rows(700)
    assert order.rows(0) != BatchOrder.of(rows, batch_size=8, distinct=1500, seed=4, stage=0).rows(0)


def test_rows_of_a_mixture_are_those_of_their_source() -> None:
    rows = _mixture(1.0, 1.0, 1.0)
    assert rows.batch([0, 39, 40, 48, 49, 248], origin="a test").input_ids[:, 3].tolist() == [0, 0, 1, 1, 2, 2]
    assert rows.tokens == 8 * len(rows) == 8 * 249
    assert rows.fingerprint != _mixture(1.0, 1.0, 2.0).fingerprint
    labelled = pack(TokenizedDocuments.of([[7] * 8], [[False] * 4 + [True] * 4]), 8)
    both = MixedRows(parts=(rows.parts[0], labelled), weights=(1.0, 1.0)).batch([0, 40], origin="a test")
    assert both.labels is not None and both.labels.tolist() == [[0] * 8, [-100] * 4 + [7] * 4]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_source_that_would_never_be_drawn_is_refused_by_name(weight: float) -> None:
    with pytest.raises(UsageError, match=r"the source 'in memory' of a mixture[\s\S]*weight"):
        _mixture(1.0, weight)


def test_rows_for_calibration_are_disjoint_from_those_at_the_end_and_follow_the_weights() -> None:
    rows = _mixture(3.0, 1.0, 4.0)
    chosen, last = select_rows(rows, 16, seed=0), select_rows(rows, 16, seed=0, from_end=True)
    assert len(chosen) == len(last) == 16 and not set(chosen.chosen) & set(last.chosen)
    assert numpy.bincount(numpy.searchsorted([40, 49], chosen.chosen, side="right")).tolist() == [6, 2, 8]
    assert chosen.tokens == 128 == sum(batch.tokens for batch in chosen.batches(3, origin="a test"))
    assert first_rows(rows, 8).chosen == (0, 1, 2, 40, 49, 50, 51, 52)
    assert select_rows(rows.parts[1], 100, seed=0).tokens == 72
