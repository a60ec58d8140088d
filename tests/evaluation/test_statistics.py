"""Paired bootstrap: width of the interval, clusters, p-value."""

from __future__ import annotations

import math

import pytest
import torch

from xarch_kd.errors import UsageError
from xarch_kd.evaluation.statistics import paired_bootstrap


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_identical_models_differ_by_nothing_with_p_1() -> None:
    nll = normal(20, 10)
    found = paired_bootstrap(nll, nll.clone())
    assert (found.mean, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_the_interval_has_the_width_of_the_central_limit() -> None:
    """500 independent rows: mean ± 1.96 standard errors, to the noise of 4000 resamples (2 % of a standard error at
    2.5 % quantiles: sqrt(0.025 * 0.975 / 4000) / density 0.058 = 0.043 errors) and of a near-normal mean."""
    first = normal(500, 4)
    second = first + 0.1 + normal(500, 1, seed=1)
    found = paired_bootstrap(first, second, resamples=4000)
    rows = (second.double() - first.double()).mean(1)
    error = float(rows.std(correction=0)) / math.sqrt(500)
    assert found.mean == pytest.approx(float(rows.mean()), rel=1e-9)
    assert found.low is not None and found.high is not None
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.15 * error)


def test_pairing_takes_out_what_both_models_share() -> None:
    shared = 5 * normal(50, 1)
    first = shared + normal(50, 30, seed=1) * 0.01
    second = shared + normal(50, 30, seed=2) * 0.01 + 0.02
    found = paired_bootstrap(first, second)
    assert found.low is not None and found.high is not None and found.p_value is not None
    assert 0.0 < found.low < 0.02 < found.high < 0.03
    # No resample is on the other side: the smallest p-value that 2000 resamples can give.
    assert found.p_value == pytest.approx(2 / 2001)


def test_rows_of_one_document_are_one_observation() -> None:
    """Every row repeated 9 times: without clusters the interval shrinks by 3, with them it stays."""
    first, second = torch.zeros(30, 1), normal(30, 1)
    once = paired_bootstrap(first, second)
    copies = (first.repeat_interleave(9, 0), second.repeat_interleave(9, 0))
    clustered = paired_bootstrap(*copies, clusters=[row // 9 for row in range(270)])
    naive = paired_bootstrap(*copies)
    assert clustered.clusters == 30
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high), rel=1e-9)
    assert naive.low is not None and naive.high is not None and once.low is not None and once.high is not None
    assert (once.high - once.low) / (naive.high - naive.low) == pytest.approx(3, rel=0.15)


def test_clusters_of_unequal_size_weigh_by_tokens() -> None:
    first, second = torch.zeros(3, 2), torch.tensor([[1.0, 1.0], [1.0, 1.0], [4.0, 4.0]])
    assert paired_bootstrap(first, second, clusters=["a", "a", "b"]).mean == pytest.approx(2.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    first, second = normal(30, 5), normal(30, 5, seed=1)
    assert paired_bootstrap(first, second, seed=3) == paired_bootstrap(first, second, seed=3)
    assert paired_bootstrap(first, second, seed=3) != paired_bootstrap(first, second, seed=4)


def test_one_row_says_nothing_of_its_spread() -> None:
    found = paired_bootstrap(torch.zeros(1, 5), torch.ones(1, 5))
    assert found.mean == 1.0
    assert found.low is None and found.high is None and found.p_value is None


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="same tokens"):
        paired_bootstrap(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UsageError, match="level"):
        paired_bootstrap(torch.zeros(2, 3), torch.zeros(2, 3), level=1.0)
    with pytest.raises(UsageError, match="one label per row"):
        paired_bootstrap(torch.zeros(2, 3), torch.zeros(2, 3), clusters=[1])
