"""Which implementation runs, and why."""

from __future__ import annotations

import pytest

from xarch_kd.errors import UsageError
from xarch_kd.ops.dispatch import ENVIRONMENT, IMPLEMENTATIONS, choose, explain_choice

NO_GPU = {"fused": "no GPU"}


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.mark.parametrize("operation", IMPLEMENTATIONS)
def test_auto_takes_the_first_that_can_run_and_an_explicit_choice_wins(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(operation) == IMPLEMENTATIONS[operation][0]
    assert choose(operation, obstacles=NO_GPU) == "streaming"
    assert choose(operation, "reference", NO_GPU) == "reference"
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert choose(operation) == "reference"
    assert choose(operation, "streaming") == "streaming"


def test_auto_never_takes_an_estimate() -> None:
    assert choose("mixing_distance", obstacles={**NO_GPU, "streaming": "x"}) == "panels"
    assert choose("mixing_distance", obstacles={**NO_GPU, "streaming": "x", "panels": "y"}) == "reference"


def test_auto_never_takes_interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("linear_divergence") == "streaming"
    assert choose("linear_divergence", "fused") == "fused"


def test_explain_names_the_choice_and_each_alternative() -> None:
    text = explain_choice("linear_divergence", obstacles=NO_GPU)
    assert "runs 'streaming'" in text
    assert "reference: dense" in text
    assert "fused: cannot run, no GPU" in text


def test_what_cannot_run_is_an_error_with_the_reason() -> None:
    with pytest.raises(UsageError, match="cannot run as 'fused': no GPU") as caught:
        choose("linear_divergence", "fused", NO_GPU)
    assert "auto | streaming | reference" in str(caught.value)
    with pytest.raises(UsageError, match="Did you mean 'streaming'"):
        choose("linear_divergence", "streeming")
    with pytest.raises(UsageError, match="Did you mean 'linear_divergence'"):
        choose("linear_divergense")
