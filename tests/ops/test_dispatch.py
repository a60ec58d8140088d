"""Choice of the implementation, and its reasons."""

from __future__ import annotations

import pytest
import torch

from xarch_kd import ops
from xarch_kd.errors import UsageError
from xarch_kd.mixing import SoftmaxMixing
from xarch_kd.ops.dispatch import ENVIRONMENT, IMPLEMENTATIONS, choose, explain_choice
from xarch_kd.ops.explanation import OPERATIONS

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
    assert choose(operation, unsupported_reasons=NO_GPU) == "streaming"
    assert choose(operation, "reference", NO_GPU) == "reference"
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert choose(operation) == "reference"
    assert choose(operation, "streaming") == "streaming"


def test_auto_never_takes_an_estimate() -> None:
    assert choose("mixing_distance", unsupported_reasons={**NO_GPU, "streaming": "x"}) == "panels"
    assert choose("mixing_distance", unsupported_reasons={**NO_GPU, "streaming": "x", "panels": "y"}) == "reference"


def test_auto_never_takes_interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("linear_divergence") == "streaming"
    assert choose("linear_divergence", "fused") == "fused"


def test_explain_names_the_choice_and_each_alternative() -> None:
    text = explain_choice("linear_divergence", unsupported_reasons=NO_GPU)
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


def test_every_operation_can_be_explained() -> None:
    assert OPERATIONS.keys() == IMPLEMENTATIONS.keys()
    for operation in OPERATIONS:
        assert f"{operation}: impl='auto' runs '" in ops.explain(operation)


def test_explain_takes_the_arguments_of_the_operation_and_computes_nothing() -> None:
    hidden, head = torch.full((3, 8), torch.nan), torch.ones(5, 8)
    text = ops.explain("linear_divergence", hidden, head, hidden, head, temperature=2.0)
    assert "impl='auto' runs 'streaming'" in text
    assert "fused: cannot run, Triton kernels need a GPU and the tensors are on the cpu" in text
    text = ops.explain("projected_distance", hidden, teacher=hidden, impl="reference")
    assert "impl='reference' runs 'reference'" in text
    assert "streaming: chunked" in text
    maps = SoftmaxMixing(query=torch.ones(1, 2, 1, 4), key=torch.ones(1, 2, 1, 4), scale=0.5)
    text = ops.explain("mixing_distance", maps, maps, distance="kl")
    assert "sketch: cannot run" in text


def test_explain_answers_for_kernels_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    features = torch.ones(3, 8)
    text = ops.explain("projected_distance", features, features)
    assert "runs 'streaming'" in text
    assert "fused: Triton kernels: no large intermediate, on a GPU (only if asked for by name)" in text
    assert "runs 'fused'" in ops.explain("projected_distance", features, features, impl="fused")
    wide = features.double()
    text = ops.explain("projected_distance", wide, wide)
    assert "fused: cannot run, the kernels take float32, bfloat16 and float16, not float64" in text


def test_explain_names_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert f"runs 'reference', named by the environment variable {ENVIRONMENT}" in ops.explain("linear_divergence")


def test_explain_refuses_what_the_operation_refuses() -> None:
    hidden, head = torch.ones(3, 8), torch.ones(5, 8)
    with pytest.raises(UsageError, match="cannot run as 'fused': Triton kernels need a GPU"):
        ops.explain("linear_divergence", hidden, head, hidden, head, impl="fused")
    with pytest.raises(UsageError, match="temperature must be positive"):
        ops.explain("linear_divergence", hidden, head, hidden, head, temperature=0.0)
    with pytest.raises(UsageError, match="not the arguments of linear_divergence"):
        ops.explain("linear_divergence", hidden, head, hidden, head, temprature=2.0)
    with pytest.raises(UsageError, match="Did you mean 'projected_distance'"):
        ops.explain("projected_distanse", hidden, hidden)


@pytest.mark.parametrize("operation", ["linear_divergence", "projected_distance"])
def test_fused_on_a_cpu_is_an_error_that_says_why(operation: str) -> None:
    hidden, head = torch.ones(3, 8), torch.ones(5, 8)
    inputs = {"linear_divergence": (hidden, head, hidden, head), "projected_distance": (hidden, hidden)}[operation]
    with pytest.raises(UsageError, match="Triton kernels need a GPU and the tensors are on the cpu") as caught:
        OPERATIONS[operation](*inputs, impl="fused")
    assert "auto | streaming | reference" in str(caught.value)
