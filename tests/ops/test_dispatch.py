"""Which implementation runs, and why."""

from __future__ import annotations

import pytest
import torch

from xarch_kd.errors import UsageError
from xarch_kd.ops import explain, linear_divergence, projected_distance
from xarch_kd.ops.dispatch import ENVIRONMENT, OPERATIONS, choose


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_auto_streams_and_an_explicit_choice_wins(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(operation) == "streaming"
    assert choose(operation, "reference") == "reference"
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert choose(operation) == "reference"
    assert choose(operation, "streaming") == "streaming"


def test_explain_names_the_choice_and_each_alternative() -> None:
    text = explain("linear_divergence")
    assert "runs 'streaming'" in text
    assert "reference: dense" in text
    assert "fused: cannot run" in text


def test_what_cannot_run_is_an_error_with_the_reason() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(UsageError, match=r"cannot run as 'fused': .*no fused kernel") as caught:
        linear_divergence(hidden, weight, hidden, weight, impl="fused")
    assert "auto | reference | streaming" in str(caught.value)
    with pytest.raises(UsageError, match="no fused kernel"):
        projected_distance(hidden, hidden, impl="fused")
    with pytest.raises(UsageError, match="Did you mean 'streaming'"):
        choose("linear_divergence", "streeming")
    with pytest.raises(UsageError, match="Did you mean 'linear_divergence'"):
        explain("linear_divergense")
