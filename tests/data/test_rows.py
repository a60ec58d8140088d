"""Packing, and the source that draws a stage's batches from the rows."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from xarch_kd.data.corpus import Corpus
from xarch_kd.data.rows import BatchOrder, StageRows, pack
from xarch_kd.errors import CheckpointError, DataError
from xarch_kd.testing.tiny import tiny_tokenizer


def _corpus(*documents: str) -> Corpus:
    return Corpus(name="c", description="c", documents=documents)


def test_packing_joins_documents_by_the_end_token_and_drops_the_tail() -> None:
    tokenizer = tiny_tokenizer()
    first, second = "hello there", "general"
    tokens = []
    for text in (first, second):
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    rows = pack(_corpus(first, second), tokenizer, 8)
    assert rows.dtype == torch.int64
    assert rows.flatten().tolist() == tokens[: len(tokens) // 8 * 8]


def test_packing_is_bounded_and_refuses_what_is_too_short() -> None:
    tokenizer = tiny_tokenizer()
    assert pack(_corpus("abc " * 500), tokenizer, 16, most=3).shape == (3, 16)
    with pytest.raises(DataError, match=r"too short for one row[\s\S]*rows of 64 tokens"):
        pack(_corpus("abc"), tokenizer, 64)


def _order(**changes: int) -> BatchOrder:
    return BatchOrder(**({"rows": 10, "batch_size": 4, "distinct": 6, "seed": 0, "stage": 0} | changes))


def test_each_pass_goes_over_all_distinct_batches_once() -> None:
    order = _order()
    passes = [[order.batch(turn * 6 + place) for place in range(6)] for turn in range(3)]
    assert passes[0] == list(range(6))
    assert all(sorted(batches) == list(range(6)) for batches in passes)
    assert passes[1] != passes[2]


def test_rows_are_reshuffled_each_epoch_and_all_used() -> None:
    order = _order(distinct=5)
    drawn = [order.row(batch, place) for batch in range(5) for place in range(4)]
    assert Counter(drawn) == dict.fromkeys(range(10), 2)
    assert drawn[:10] != drawn[10:]


def test_seed_and_stage_change_the_order() -> None:
    def drawn(order: BatchOrder) -> list[int]:
        return [order.row(0, place) for place in range(4)] + [order.row(1, place) for place in range(4)]

    assert drawn(_order()) == drawn(_order())
    assert drawn(_order()) != drawn(_order(seed=1))
    assert drawn(_order()) != drawn(_order(stage=1))


def _source(order: BatchOrder | None = None, shift: int = 0) -> StageRows:
    return StageRows(torch.arange(10).unsqueeze(1).repeat(1, 8) + shift, order or _order())


def test_batches_come_in_training_order_with_their_number() -> None:
    source, order = _source(), _order()
    drawn = [source.draw() for _ in range(9)]
    for index, batch in enumerate(drawn):
        number = order.batch(index)
        assert batch.origin == f"batch {number}"
        assert batch.input_ids[:, 0].tolist() == [order.row(number, place) for place in range(4)]


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
