"""Automatic weights: scales from observed gradient norms, their limits, and a state that can be restored."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from xarch_kd.errors import CheckpointError, NonFiniteLoss, UsageError
from xarch_kd.losses.balance import LARGEST_SCALE, Balance


def test_the_scale_is_the_geometric_mean_of_the_first_observations() -> None:
    balance = Balance(anchor="a", parts=("b", "c"), observations=2)
    assert balance.scales == {"b": 1.0, "c": 1.0}
    for norms in ({"a": 2.0, "b": 1.0, "c": 4.0}, {"a": 8.0, "b": 1.0, "c": 4.0}, {"a": 1e6, "b": 1.0, "c": 1.0}):
        balance = balance.observe(norms)
    assert balance.done
    assert balance.scales == pytest.approx({"b": math.sqrt(2 * 8), "c": math.sqrt(0.5 * 2)})


def test_gradients_of_zero_say_nothing_and_scales_have_a_limit() -> None:
    balance = Balance(anchor="a", parts=("b",), observations=1)
    for norms in ({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0}, {"b": 1.0}):
        balance = balance.observe(norms)
    assert not balance.done and balance.scale("b") == 1
    assert balance.observe({"a": 1e9, "b": 1e-9}).scale("b") == pytest.approx(LARGEST_SCALE)
    assert balance.observe({"a": 1e-9, "b": 1e9}).scale("b") == pytest.approx(1 / LARGEST_SCALE)


def test_the_state_comes_back_through_json() -> None:
    balance = Balance(anchor="a", parts=("b", "c"), observations=3).observe({"a": 3.0, "b": 0.7, "c": 1e-5})
    state = json.loads(json.dumps(balance.state()))
    assert state["scales"] == balance.scales
    again = Balance(anchor="a", parts=("b", "c"), observations=3).load(state)
    assert again == balance and again.scales == balance.scales
    assert again.observe({"a": 1.0, "b": 2.0, "c": 1.0}) == balance.observe({"a": 1.0, "b": 2.0, "c": 1.0})


@pytest.mark.parametrize("other", [{"anchor": "z"}, {"parts": ("b",)}, {"observations": 4}])
def test_the_state_of_another_stage_is_refused(other: dict[str, Any]) -> None:
    options: dict[str, Any] = {"anchor": "a", "parts": ("b", "c"), "observations": 3}
    with pytest.raises(CheckpointError, match="another stage"):
        Balance(**(options | other)).load(Balance(**options).state())


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match="one step or more"):
        Balance(anchor="a", parts=("b",), observations=0)
    for parts in (("a",), ("b", "b")):
        with pytest.raises(UsageError, match="must differ"):
            Balance(anchor="a", parts=parts)
    with pytest.raises(NonFiniteLoss, match="objective b"):
        Balance(anchor="a", parts=("b",)).observe({"a": 1.0, "b": float("nan")})
