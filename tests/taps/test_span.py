from __future__ import annotations

import pytest
import torch

from xarch_kd.errors import TapError
from xarch_kd.taps.span import span_of


def test_padding_at_either_end() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    for given in (mask, mask.bool(), mask.double()):
        start, stop = span_of(given)
        assert start is not None and stop is not None
        assert start.tolist() == [0, 2, 0, 1, 0]
        assert stop.tolist() == [4, 4, 1, 3, 0]
        assert start.dtype == stop.dtype == torch.int64


def test_no_mask_no_span() -> None:
    assert span_of(None) == (None, None)


def test_the_span_goes_where_it_is_asked_to() -> None:
    start, stop = span_of(torch.ones(2, 3), torch.device("meta"))
    assert start is not None and stop is not None
    assert start.device.type == stop.device.type == "meta"


def test_a_mask_with_a_hole_is_refused() -> None:
    with pytest.raises(TapError, match=r"sequence 1 counts 2 tokens"):
        span_of(torch.tensor([[1, 1, 1], [1, 0, 1]]))


def test_a_mask_of_pairs_is_refused() -> None:
    with pytest.raises(TapError, match=r"\[1, 1, 3, 3\]"):
        span_of(torch.ones(1, 1, 3, 3))
