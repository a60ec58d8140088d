"""Taps of live models of mamba_ssm equal those of the stock model with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mamba_ssm_peer import needs_mamba_ssm
from tests.models.test_mamba_ssm import model_of
from tests.taps.mamba_ssm_traces import main
from xarch_kd.models.mamba_ssm.format import export_mamba_ssm
from xarch_kd.models.mamba_ssm.weights import mamba_ssm_state
from xarch_kd.taps.trace import trace
from xarch_kd.testing.launch import in_a_fork
from xarch_kd.testing.tiny import VOCABULARY

pytestmark = needs_mamba_ssm

NAMES = ("biases", "wide heads", "whole rotary", "bounded steps", "mamba2", "mamba")
IDS = torch.randint(1, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(IDS)
MASK[1, 15:] = 0
# Relative errors over a whole tensor: both sides round in their own order, which makes 3e-6 at most here. A residual
# stream without one of its two parts, or keys that are rotated twice, differ by a tenth and more.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the features that the program wrote, by case."""
    root = tmp_path_factory.mktemp("live")
    torch.save({"ids": IDS, "mask": MASK}, root / "ids.pt")
    for name in NAMES:
        export_mamba_ssm(model_of(name), root / name)
    in_a_fork(main, root)
    return {name: torch.load(root / name / "traces.pt", weights_only=True) for name in NAMES}


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_taps_are_those_of_the_stock_model(name: str, traces: dict[str, dict[str, Any]]) -> None:
    model, found = model_of(name), traces[name]
    taps = [tap for tap in ("mlp_output", "mixer_input", "mixer_output", "hidden", "mixing", "values") if tap in found]
    assert ("mlp_output" in taps) == (model.config.model_type == "bamba")
    expected = trace(model, IDS, MASK, taps=["embedding", "head_input", *taps])
    assert found["embedding"].equal(expected["embedding"])
    counted = MASK.bool()
    assert error(found["head_input"][counted], expected["head_input"][counted]) <= TOLERANCE
    for tap in taps:
        assert found[tap].keys() == expected[tap].keys()
        for layer, read in expected[tap].items():
            if tap == "mixing":
                # Rows of padding are 0 in both.
                assert error(found[tap][layer], read.dense()) <= TOLERANCE, (tap, layer)
            else:
                assert error(found[tap][layer][counted], read[counted]) <= TOLERANCE, (tap, layer)


@pytest.mark.parametrize("name", NAMES)
def test_the_matrix_times_the_values_makes_the_mixers_output(name: str, traces: dict[str, dict[str, Any]]) -> None:
    assert traces[name]["rebuilt"].keys() == {0, 1, 2}
    for layer, (rebuilt, output) in traces[name]["rebuilt"].items():
        assert error(rebuilt, output) <= TOLERANCE, layer


@pytest.mark.parametrize("name", NAMES)
def test_a_block_alone_gives_what_it_gives_in_the_model(name: str, traces: dict[str, dict[str, Any]]) -> None:
    for layer, stream in traces[name]["hidden"].items():
        assert error(traces[name]["replayed"][layer], stream) <= 1e-5, layer


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_stock_model(name: str, traces: dict[str, dict[str, Any]]) -> None:
    model = model_of(name)
    mixings = trace(model, IDS, taps=["mixing"])["mixing"].values()
    torch.stack([mixing.dense().square().sum() for mixing in mixings]).sum().backward()
    expected = mamba_ssm_state({key: _gradient(value) for key, value in model.named_parameters()}, model.config)
    found = traces[name]["gradients"]
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for key, gradient in expected.items():
        assert float((found.get(key, torch.zeros(1)) - gradient).norm() / whole) <= TOLERANCE, key
    assert {key for key, value in expected.items() if value.any()} == {
        key for key, value in found.items() if value.any()
    }


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def test_parts_are_found(traces: dict[str, dict[str, Any]]) -> None:
    assert tuple(traces["biases"]["kinds"]) == ("mamba2", "attention", "mamba2")
    assert tuple(traces["mamba"]["kinds"]) == ("mamba",) * 3
    names = [f"backbone.layers.1.mixer.{name}" for name in ("in_proj.weight", "in_proj.bias")]
    assert list(traces["biases"]["trained"][:2]) == names
    assert all(name.startswith("backbone.layers.1.mixer.") for name in traces["mamba2"]["trained"])


def test_padding_on_the_left_is_refused(traces: dict[str, dict[str, Any]]) -> None:
    assert all("take no attention mask" in found["left"] for found in traces.values())
