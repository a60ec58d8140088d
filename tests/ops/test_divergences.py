"""Names, parameters and ranges of divergences."""

from __future__ import annotations

from typing import Any

import pytest

from xarch_kd.errors import UsageError
from xarch_kd.ops import Divergence
from xarch_kd.ops.divergences import as_divergence


def test_a_divergence_is_read_from_a_name_a_mapping_and_itself() -> None:
    expected = Divergence(kind="jsd", beta=0.25, normalised=True)
    assert as_divergence("forward_kl") == Divergence(kind="forward_kl")
    assert as_divergence({"kind": "jsd", "beta": 0.25, "normalised": True}) == expected
    assert as_divergence(expected) is expected


def test_parameters_have_defaults() -> None:
    assert as_divergence("jsd").parameter == 0.5
    assert as_divergence("skew_forward_kl").parameter == 0.1
    assert as_divergence("forward_kl").parameter is None


@pytest.mark.parametrize(
    ("value", "end"),
    [
        ({"kind": "jsd", "beta": 0}, "forward_kl"),
        ({"kind": "jsd", "beta": 1.0}, "reverse_kl"),
        ({"kind": "skew_forward_kl", "alpha": 0.0}, "forward_kl"),
        ({"kind": "skew_reverse_kl", "alpha": 0.0}, "reverse_kl"),
        ({"kind": "alpha", "alpha": 1.0}, "forward_kl"),
        ({"kind": "alpha", "alpha": 0.0}, "reverse_kl"),
        ({"kind": "renyi", "alpha": 1.0}, "forward_kl"),
        ({"kind": "jsd", "beta": 0.5}, "jsd"),
    ],
)
def test_the_ends_of_each_family(value: dict[str, Any], end: str) -> None:
    assert as_divergence(value).limit().kind == end


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("foward_kl", ["Did you mean 'forward_kl'?", "total_variation"]),
        ({"kind": "jsd", "beta": 1.5}, ["beta=1.5", "0 <= beta <= 1"]),
        ({"kind": "jsd", "beta": -0.1}, ["beta=-0.1", "0 <= beta <= 1"]),
        ({"kind": "jsd", "beta": float("nan")}, ["0 <= beta <= 1"]),
        ({"kind": "jsd", "alpha": 0.5}, ["takes no alpha", "beta"]),
        ({"kind": "forward_kl", "beta": 0.5}, ["takes no beta"]),
        ({"kind": "forward_kl", "normalised": True}, ["only jsd"]),
        ({"kind": "skew_forward_kl", "alpha": 1.0}, ["0 <= alpha < 1"]),
        ({"kind": "renyi", "alpha": 0.0}, ["alpha > 0"]),
        ({"kind": "alpha", "alpha": float("inf")}, ["finite alpha"]),
        ({"beta": 0.5}, ["'kind'"]),
        ({"kind": "jsd", "betta": 0.5}, ["betta", "normalised"]),
    ],
)
def test_what_is_refused(value: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        as_divergence(value)
    for word in words:
        assert word in str(caught.value)
