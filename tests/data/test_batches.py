"""Batches: refusals, derived quantities, and the cache key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.data.batches import Batch
from xarch_kd.errors import UsageError
from xarch_kd.losses.tokens import next_token_labels

IDS = torch.randint(2, 97, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])


def _labels(*changes: tuple[int, int, int]) -> Tensor:
    labels = IDS.masked_fill(~MASK, -100)
    for row, position, value in changes:
        labels[row, position] = value
    return labels


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids does not fit[\s\S]*\[batch, time\]"),
        ({"input_ids": IDS.float()}, "input_ids must be integers"),
        ({"attention_mask": MASK[:, :5]}, r"attention_mask does not fit[\s\S]*\[2, 5\][\s\S]*\[2, 6\]"),
        ({"attention_mask": MASK.long()}, r"attention_mask must be boolean[\s\S]*attention_mask.bool\(\)"),
        ({"attention_mask": MASK.flip(1)}, r"padded on the left[\s\S]*row 1[\s\S]*padding_side"),
        ({"labels": IDS[:1]}, "labels does not fit"),
        ({"labels": IDS.double()}, "labels must be integers"),
        (
            {"attention_mask": MASK, "labels": _labels((1, 4, 7))},
            r"attention_mask and labels disagree[\s\S]*1 such tokens, the first in row 1 at position 4, label 7"
            r"[\s\S]*masked_fill",
        ),
        ({"position_ids": POSITIONS + 1}, r"position_ids jump[\s\S]*1 after -1 in row 0 at position 0"),
        ({"position_ids": POSITIONS * 2}, r"position_ids jump[\s\S]*2 after 0 in row 0 at position 1"),
        ({"labels": IDS.to("meta")}, "another device"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Batch(**{"input_ids": IDS, **given})


def test_what_counts_follows_from_mask_and_labels() -> None:
    labels = _labels((0, 1, -100), (0, 2, -100))
    batch = Batch(input_ids=IDS, attention_mask=MASK, labels=labels)
    assert torch.equal(batch.next_tokens, next_token_labels(IDS, MASK, labels=labels))
    for indices, expected in ((batch.valid, MASK), (batch.predicted, batch.next_tokens != -100)):
        assert indices is not None
        assert torch.equal(indices, expected.flatten().nonzero().squeeze(1))
    assert (batch.tokens, batch.predictions) == (9, 5)
    assert repr(batch) == "Batch(2 x 6 tokens, 9 count, 5 are predicted, from the caller)"


def test_a_mask_of_ones_and_positions_of_whole_rows_are_none_at_all() -> None:
    batch = Batch(input_ids=IDS, attention_mask=torch.ones_like(MASK), position_ids=torch.arange(6).expand(2, -1))
    assert batch.attention_mask is None and batch.position_ids is None and batch.valid is None
    assert batch.fingerprint == Batch(input_ids=IDS).fingerprint


def test_the_first_token_of_a_packed_document_is_not_predicted_from_the_document_before() -> None:
    batch = Batch(input_ids=IDS, position_ids=POSITIONS)
    assert batch.next_tokens[0].tolist() == [*IDS[0, 1:3].tolist(), -100, *IDS[0, 4:].tolist(), -100]
    assert batch.predictions == 9


def test_the_fingerprint_is_of_all_that_a_model_reads() -> None:
    different = [
        Batch(input_ids=IDS),
        Batch(input_ids=IDS.flip(0)),
        Batch(input_ids=IDS.view(3, 4)),
        Batch(input_ids=IDS, attention_mask=MASK),
        Batch(input_ids=IDS, position_ids=POSITIONS),
    ]
    assert len({batch.fingerprint for batch in different}) == len(different)
    same = Batch(input_ids=IDS.int(), labels=IDS, origin="elsewhere")
    assert same.fingerprint == different[0].fingerprint


def test_a_moved_batch_is_the_same_without_a_second_look_at_its_values() -> None:
    # Values of a meta tensor cannot be read at all.
    batch = Batch(input_ids=IDS, attention_mask=MASK, labels=_labels(), origin="here")
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in (moved.input_ids, moved.attention_mask, moved.labels)} == {"meta"}  # type: ignore[union-attr]
    assert (moved.fingerprint, moved.tokens, moved.predictions) == (batch.fingerprint, 9, 7)
    assert moved.next_tokens.device.type == "meta" and repr(moved) == repr(batch)


def test_rows_without_their_padding_come_in_batches_of_one_length() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6, [1, 1, 1, 0, 0, 0], [0] * 6], dtype=torch.bool)
    ids = torch.arange(24).view(4, 6)
    short, long = Batch(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~mask, -100)).unpadded()
    assert torch.equal(short.input_ids, ids[[0, 2], :3]) and torch.equal(long.input_ids, ids[1:2])
    assert (short.tokens, short.predictions, long.tokens) == (6, 4, 6)
    with pytest.raises(UsageError, match="between tokens"):
        list(Batch(input_ids=ids[:1], attention_mask=torch.tensor([[1, 0, 1, 0, 0, 0]], dtype=torch.bool)).unpadded())


def test_ranks_share_the_rows_of_a_batch() -> None:
    batch = Batch(input_ids=IDS, attention_mask=MASK, labels=_labels())
    shards = [batch.shard(rank, 2) for rank in range(2)]
    assert [shard.tokens for shard in shards] == [6, 3]
    assert torch.equal(torch.cat([shard.input_ids for shard in shards]), IDS)
    assert batch.shard(0, 1) is batch
    with pytest.raises(UsageError, match=r"2 rows for 3 processes[\s\S]*batch_size >= 3"):
        batch.shard(0, 3)


def test_labelled_tokens_are_those_of_the_mask_with_a_label() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    labels = torch.tensor([[-100, -100, 7, 8], [9, 10, 11, -100]])
    batch = Batch(input_ids=ids, attention_mask=mask, labels=labels)
    assert batch.labelled_mask is not None and batch.labelled is not None
    assert torch.equal(batch.labelled_mask, labels != -100)
    assert batch.labelled.tolist() == [2, 3, 4, 5, 6] and batch.labelled_tokens == 5
    # Without labels every token that the mask keeps is one of them.
    without = Batch(input_ids=ids, attention_mask=mask)
    assert without.labelled_mask is not None and torch.equal(without.labelled_mask, mask)
    assert Batch(input_ids=ids).labelled_mask is None and Batch(input_ids=ids).labelled_tokens == 8


def test_models_take_position_ids_instead_of_a_mask_where_packed_rows_are_padded_at_their_ends() -> None:
    ids, positions = torch.arange(6).view(1, 6), torch.tensor([[0, 1, 0, 1, 0, 1]])
    at_the_end, inside = torch.tensor([[True] * 4 + [False] * 2]), torch.tensor([[True, False, True, True, True, True]])
    assert Batch(input_ids=ids, attention_mask=at_the_end, position_ids=positions).model_mask is None
    assert Batch(input_ids=ids, attention_mask=inside, position_ids=positions).model_mask is not None
    assert Batch(input_ids=ids, attention_mask=at_the_end).model_mask is not None
