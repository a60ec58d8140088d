from __future__ import annotations

from collections.abc import Sequence

import pytest

from xarch_kd.errors import UsageError
from xarch_kd.models.conversion.layer_selection import kept_layers


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("every 4", (3, 7)),
        ("every 1", tuple(range(10))),
        ("every 3 from 0", (0, 3, 6, 9)),
        ("Every 4 from 9", (9,)),
        ("first 2", (0, 1)),
        (" last  3 ", (7, 8, 9)),
        ("first 0", ()),
        ("none", ()),
        ("all", tuple(range(10))),
        ([5, 0], (0, 5)),
        ([], ()),
    ],
)
def test_selects_the_blocks_that_keep_attention(words: str | Sequence[int], expected: tuple[int, ...]) -> None:
    assert kept_layers(10, keep_attention=words) == expected
    assert kept_layers(10, replace=words) == tuple(index for index in range(10) if index not in expected)


def test_replacing_every_seventh_of_thirty_blocks() -> None:
    assert sorted(set(range(30)) - set(kept_layers(30, replace="every 7"))) == [6, 13, 20, 27]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ([0, 10], "names block 10, but the model has 10 blocks"),
        ([-1], "names block -1"),
        ([3, 3, 5], "has a block twice: 3"),
        ([True], "not a block index"),
        ("every other", "not a selection of blocks"),
        ("every 0", "the model lacks"),
        ("every 11", "the model lacks"),
        ("every 2 from 10", "the model lacks"),
        ("last 11", "the model lacks"),
    ],
)
def test_refuses_what_does_not_fit(selection: str | Sequence[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kept_layers(10, keep_attention=selection)


def test_needs_exactly_one_selection() -> None:
    with pytest.raises(UsageError, match="Exactly one of keep_attention and replace"):
        kept_layers(10)
    with pytest.raises(UsageError, match="Exactly one of keep_attention and replace"):
        kept_layers(10, keep_attention="all", replace=[1])
