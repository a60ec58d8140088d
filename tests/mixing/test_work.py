"""Work of `apply`, as counted numbers written, not time; no time × time tensor anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xarch_kd.mixing import Mixing, row_softmax, scan

Build = Callable[..., Mixing]
LINEAR = [
    "ssd",
    "ssd-small-state",
    "recurrent-unit",
    "selective",
    "linear",
    "linear-normalized",
    "linear-head-decay",
    "linear-channel-decay",
    "delta",
    "delta-head-decay",
    "delta-channel-decay",
    "banded",
    "softmax-window",
    "softmax-all",
]
SCANNED = ["ssd", "selective", "linear-channel-decay", "delta-head-decay", "delta-channel-decay"]
# One decay per head and a small state: chunks of 16.
SHORT_CHUNKS = ["ssd-small-state", "recurrent-unit", "linear", "linear-normalized", "linear-head-decay"]
QUADRATIC = ["softmax-grouped", "softmax-capped", "softmax-sinks", "softmax-bidirectional"]


class Written(TorchDispatchMode):
    """Mode that counts the numbers written by every operation, forward and backward, and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.total += tensor.numel()
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def work(build: Build, case: str, time: int) -> Written:
    """One sequence forward and backward."""
    mixing = build(case, batch=1, time=time, dtype=torch.float32)
    values = torch.ones(1, time, mixing.heads, 4, requires_grad=True)
    with Written() as written:
        mixing.apply(values).sum().backward()
    return written


@pytest.fixture
def pieces(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of at most 256 tokens: the shortest sequence has some too, or it would be counted another way."""
    monkeypatch.setitem(scan.SEGMENT_ELEMENTS, "cpu", 1 << (14 if case in SHORT_CHUNKS else 16))
    monkeypatch.setitem(row_softmax.BLOCK_ELEMENTS, "cpu", 1 << 14)


@pytest.mark.parametrize("case", LINEAR)
def test_work_is_linear(build: Build, pieces: None, case: str) -> None:
    """Twice the tokens write at most 2.1 times the numbers; four maps of the longer would be 4 million."""
    short, long = (work(build, case, time) for time in (512, 1024))
    assert 1.8 <= long.total / short.total <= 2.1
    assert long.largest <= 2.1 * short.largest
    assert long.largest < 1024**2 / 2


@pytest.mark.parametrize(
    "case", ["ssd", "selective", "linear-channel-decay", "delta-head-decay", "delta-channel-decay"]
)
def test_work_in_one_segment_is_linear(build: Build, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setitem(scan.SEGMENT_ELEMENTS, "cpu", 1 << 40)
    assert work(build, case, 1024).total / work(build, case, 512).total <= 2.1


@pytest.mark.parametrize("case", QUADRATIC)
def test_attention_holds_no_map(build: Build, pieces: None, case: str) -> None:
    """Its work is quadratic; its largest tensor is a block of rows or as long as the factors."""
    for time in (512, 1024):
        largest = work(build, case, time).largest
        # A block of 16 rows of the four maps, or a factor of four heads of 8.
        assert largest <= 4 * max(16, 8) * time < time**2


@pytest.mark.parametrize("case", [*LINEAR, *QUADRATIC])
def test_a_block_of_one_column_holds_no_map(build: Build, pieces: None, case: str) -> None:
    time = 512
    mixing = build(case, batch=1, time=time, dtype=torch.float32)
    with Written() as written:
        mixing.block(slice(0, time), slice(7, 8)).sum().backward()
    assert written.largest <= 4 * 64 * time < time**2


@pytest.mark.parametrize(
    "case", ["selective", "linear-channel-decay", "delta-channel-decay", "delta-head-decay", "ssd"]
)
def test_a_block_of_rows_makes_no_exponent_of_each_pair_and_channel(build: Build, case: str) -> None:
    """Rows × columns × heads entries; with one exponent per channel there would be 4 or 8 times as many."""
    mixing = build(case, batch=1, time=1024, dtype=torch.float32)
    with Written() as written, torch.no_grad():
        mixing.block(slice(960, 1024), slice(0, 1024))
    assert written.largest <= 4 * 64 * 1024


def test_the_count_sees_the_dense_form(build: Build) -> None:
    mixing = build("linear", batch=1, time=256)
    with Written() as written:
        mixing.dense()
    assert written.largest >= 4 * 256**2
