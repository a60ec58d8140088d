"""Factors, options and values that do not fit: each raises an error with the allowed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.mixing import BandedMixing, DeltaMixing, LinearMixing, Mixing, SelectiveMixing, SoftmaxMixing, SSDMixing

B, T, H, D = 2, 5, 4, 3


def token(*shape: int) -> Tensor:
    return torch.ones(B, T, *shape)


GOOD: dict[type[Mixing], dict[str, Any]] = {
    SoftmaxMixing: {"query": token(H, D), "key": token(2, D), "scale": 1.0},
    SSDMixing: {"C": token(2, D), "B": token(2, D), "log_decay": -token(H), "dt": token(H)},
    SelectiveMixing: {"C": token(D), "B": token(D), "dt": token(H), "A": -torch.ones(H, D)},
    LinearMixing: {"query": token(H, D), "key": token(2, D)},
    DeltaMixing: {"query": token(H, D), "key": token(H, D), "beta": token(H)},
    BandedMixing: {"taps": torch.ones(H, 2), "row_scale": token(H)},
}
FLAT, LONG = torch.ones(B, T), torch.ones(B, T + 1, H, D)
BAD: list[tuple[type[Mixing], dict[str, Any], str]] = [
    (SoftmaxMixing, {"query": FLAT}, "number of axes"),
    (SoftmaxMixing, {"key": FLAT}, "number of axes"),
    (SoftmaxMixing, {"key": LONG}, r"'key'[\s\S]*the wrong shape"),
    (SoftmaxMixing, {"key": token(3, D)}, "key heads.*evenly"),
    (SoftmaxMixing, {"key": token(2, D + 1)}, "the wrong shape"),
    (SoftmaxMixing, {"sinks": torch.ones(H + 1)}, "'sinks'"),
    (SoftmaxMixing, {"window": 0}, r"window[\s\S]*>= 1"),
    (SoftmaxMixing, {"softcap": 0.0}, r"softcap[\s\S]*> 0"),
    (SoftmaxMixing, {"softcap": -1.0}, "softcap"),
    (SoftmaxMixing, {"softcap": float("nan")}, "softcap"),
    (SoftmaxMixing, {"scale": float("nan")}, "scale"),
    (SoftmaxMixing, {"scale": float("inf")}, "scale"),
    (SoftmaxMixing, {"query": token(H, D).long()}, "not a floating-point"),
    (SoftmaxMixing, {"key": token(2, D).to("meta")}, "several devices"),
    (SoftmaxMixing, {"query": torch.ones(B, 0, H, D), "key": torch.ones(B, 0, 2, D)}, "tokens"),
    (SSDMixing, {"C": token(D)}, "number of axes"),
    (SSDMixing, {"log_decay": token()}, "number of axes"),
    (SSDMixing, {"C": torch.ones(B, T + 1, 2, D)}, "'C'"),
    (SSDMixing, {"B": token(1, D)}, "'B'"),
    (SSDMixing, {"C": token(3, D), "B": token(3, D)}, "groups.*evenly"),
    (SSDMixing, {"dt": token(1)}, "'dt'"),
    (SSDMixing, {"D": torch.ones(1)}, "'D'"),
    (SSDMixing, {"log_decay": token(H)}, r"'log_decay'[\s\S]*wrong sign[\s\S]*at most 0"),
    (SelectiveMixing, {"C": token()}, "number of axes"),
    (SelectiveMixing, {"dt": token()}, "number of axes"),
    (SelectiveMixing, {"C": torch.ones(B, T + 1, D)}, "'C'"),
    (SelectiveMixing, {"B": token(D + 1)}, "'B'"),
    (SelectiveMixing, {"C": token(3, D), "B": token(3, D)}, "groups.*evenly"),
    (SelectiveMixing, {"A": -torch.ones(H, D + 1)}, "'A'"),
    (SelectiveMixing, {"D": torch.ones(1)}, "'D'"),
    (SelectiveMixing, {"A": torch.ones(H, D)}, r"'A'[\s\S]*wrong sign"),
    (SelectiveMixing, {"dt": -token(H)}, r"'dt'[\s\S]*wrong sign[\s\S]*at least 0"),
    (LinearMixing, {"query": FLAT}, "number of axes"),
    (LinearMixing, {"key": FLAT}, "number of axes"),
    (LinearMixing, {"key": token(2, D + 1)}, "'key'"),
    (LinearMixing, {"key": token(3, D)}, "evenly"),
    (LinearMixing, {"scale": float("nan")}, "scale"),
    (LinearMixing, {"log_decay": token()}, "number of axes"),
    (LinearMixing, {"log_decay": -token(2)}, "'log_decay'"),
    (LinearMixing, {"log_decay": -token(H, 1)}, "'log_decay'"),
    (LinearMixing, {"log_decay": token(H, D)}, "wrong sign"),
    (DeltaMixing, {"query": FLAT}, "number of axes"),
    (DeltaMixing, {"key": token(2, D)}, "'key'"),
    (DeltaMixing, {"beta": token(1)}, "'beta'"),
    (DeltaMixing, {"scale": float("inf")}, "scale"),
    (DeltaMixing, {"log_decay": token()}, "number of axes"),
    (DeltaMixing, {"log_decay": -token(1)}, "'log_decay'"),
    (DeltaMixing, {"log_decay": -token(H, 1)}, "'log_decay'"),
    (DeltaMixing, {"log_decay": token(H)}, "wrong sign"),
    (BandedMixing, {"taps": torch.ones(H)}, "number of axes"),
    (BandedMixing, {"taps": torch.ones(H, 0)}, "at least one"),
    (BandedMixing, {"row_scale": token()}, "number of axes"),
    (BandedMixing, {"row_scale": None}, "number of sequences"),
    (BandedMixing, {"row_scale": token(1)}, "'row_scale'"),
    (BandedMixing, {"column_scale": token(1)}, "'column_scale'"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_factors_that_do_not_fit(kind: type[Mixing], change: dict[str, Any], message: str) -> None:
    kind(**GOOD[kind])
    with pytest.raises(UsageError, match=message):
        kind(**{**GOOD[kind], **change})


@pytest.fixture(params=list(GOOD), ids=lambda kind: kind.__name__)
def made(request: pytest.FixtureRequest) -> Callable[..., Mixing]:
    """Return a function that builds a mixing of each kind, with extra fields."""
    return lambda **more: request.param(**GOOD[request.param], **more)


@pytest.mark.parametrize("valid_range", [[[3, 2], [0, 5]], [[-1, 5], [0, 5]], [[0, 5], [0, 6]], [[6, 5], [0, 5]]])
def test_a_valid_range_outside_the_sequence(made: Callable[..., Mixing], valid_range: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="0 <= start <= stop <= 5"):
        made(valid_range=torch.tensor(valid_range))


@pytest.mark.parametrize(
    "valid_range", [torch.zeros(B, 2), torch.zeros(B + 1, 2, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)]
)
def test_a_valid_range_of_another_form(made: Callable[..., Mixing], valid_range: Tensor) -> None:
    with pytest.raises(UsageError, match=r"\[batch, 2\] = \[2, 2\] of torch.int64"):
        made(valid_range=valid_range)


def test_a_valid_range_elsewhere(made: Callable[..., Mixing]) -> None:
    with pytest.raises(UsageError, match="one device"):
        made(valid_range=torch.zeros(B, 2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (token(H), "do not fit"),
        (token(H - 1, 2), "do not fit"),
        (LONG, "do not fit"),
        (token(H, 2).long(), "floating point"),
        (token(H, 2).to("meta"), "one device"),
    ],
)
def test_values_that_do_not_fit(made: Callable[..., Mixing], values: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made().apply(values)


def test_a_block_with_a_step(made: Callable[..., Mixing]) -> None:
    with pytest.raises(UsageError, match="step 1"):
        made().block(slice(0, 4, 2), slice(0, 4))


def test_a_wrong_sign_where_nothing_counts_is_no_error() -> None:
    log_decay = -token(H)
    log_decay[0, 3:] = 1.0
    SSDMixing(**{**GOOD[SSDMixing], "log_decay": log_decay}, valid_range=torch.tensor([[0, 3], [0, 5]]))
    with pytest.raises(UsageError, match="wrong sign"):
        SSDMixing(**{**GOOD[SSDMixing], "log_decay": log_decay}, valid_range=torch.tensor([[0, 4], [0, 5]]))


def test_fields_go_by_name_and_do_not_change(made: Callable[..., Mixing]) -> None:
    mixing = made()
    with pytest.raises(AttributeError):
        mixing.valid_range = torch.zeros(B)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        type(mixing)(None, None)  # pyright: ignore[reportCallIssue]


def test_a_wrong_sign_beside_nan_is_seen() -> None:
    log_decay = -token(H)
    log_decay[0, 0], log_decay[1, 1] = float("nan"), 1.0
    with pytest.raises(UsageError, match="wrong sign"):
        SSDMixing(**{**GOOD[SSDMixing], "log_decay": log_decay})
