from __future__ import annotations

import pytest
import torch

from xarch_kd.errors import TapError
from xarch_kd.taps.valid_range import valid_range_of


def test_padding_at_either_end() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    for given in (mask, mask.bool(), mask.double()):
        found = valid_range_of(given)
        assert found is not None
        assert found.tolist() == [[0, 4], [2, 4], [0, 1], [1, 3], [0, 0]]
        assert found.dtype == torch.int64


def test_without_a_mask_there_is_no_range() -> None:
    assert valid_range_of(None) is None


def test_the_range_is_on_the_device_that_was_named() -> None:
    found = valid_range_of(torch.ones(2, 3), torch.device("meta"))
    assert found is not None
    assert found.device.type == "meta"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 1], [1, 0, 1]]), "sequence 1 has 2 valid tokens"),
        (torch.ones(1, 1, 3, 3), r"\[1, 1, 3, 3\]"),
    ],
)
def test_a_mask_with_a_hole_or_of_pairs_is_refused(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(TapError, match=message):
        valid_range_of(mask)
