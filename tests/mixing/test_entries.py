"""Entries of every family against its formula or recurrence, whole and in blocks, and applied to values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.mixing import DENSE_LIMIT, Mixing, decay, row_softmax, scan

Build = Callable[..., Mixing]
Formula = Callable[[Mixing], Tensor]
BOUNDS = ["whole", "right", "left", "both", "empty"]
# Sums of some 80 terms of size 1 to 100 in float64, in another order: 80 × 100 × 2.2e-16, and room for solves.
EXACT = 1e-11
DECAYED = [
    "ssd",
    "ssd-groups",
    "ssd-small-state",
    "recurrent-unit",
    "selective",
    "linear-head-decay",
    "linear-channel-decay",
    "linear-channel-decay-normalized",
    "delta-head-decay",
    "delta-channel-decay",
]


def values_for(mixing: Mixing, width: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (mixing.batch, mixing.time, mixing.heads, width)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def times(entries: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhw->bihw", entries, values)


def gradients(result: Tensor, *inputs: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    upstream = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
    return list(torch.autograd.grad(result, inputs, upstream))


def close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(1, largest))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut segments and blocks of rows so small that a short sequence has many."""
    monkeypatch.setitem(scan.SEGMENT_ELEMENTS, "cpu", 1)
    monkeypatch.setitem(row_softmax.BLOCK_ELEMENTS, "cpu", 1)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_dense_is_the_formula_and_apply_is_dense_times_values(
    build: Build, formula: Formula, case: str, bounds: str
) -> None:
    mixing = build(case, bounds=bounds)
    expected = formula(mixing)
    close(mixing.dense(), expected)
    for width in (1, 11):
        values = values_for(mixing, width)
        result = mixing.apply(values)
        assert result.dtype == values.dtype
        close(result, times(expected, values))


@pytest.mark.parametrize("bounds", ["whole", "both"])
def test_gradients_of_apply(build: Build, formula: Formula, case: str, bounds: str) -> None:
    mixing = build(case, bounds=bounds)
    values = values_for(mixing, 5).requires_grad_()
    inputs = [factor for factor in (*mixing.factors.values(), values) if factor.requires_grad]
    expected = gradients(times(formula(mixing), values), *inputs)
    for found, wanted in zip(gradients(mixing.apply(values), *inputs), expected, strict=True):
        close(found, wanted)


def test_small_pieces_give_the_same(build: Build, formula: Formula, case: str, small_pieces: None) -> None:
    mixing = build(case, bounds="both")
    values = values_for(mixing, 5).requires_grad_()
    inputs = [factor for factor in (*mixing.factors.values(), values) if factor.requires_grad]
    expected = times(formula(mixing), values)
    close(mixing.apply(values), expected)
    with torch.no_grad():
        close(mixing.apply(values), expected)
    pairs = zip(gradients(mixing.apply(values), *inputs), gradients(expected, *inputs), strict=True)
    for found, wanted in pairs:
        close(found, wanted)


SLICES = [
    (slice(0, 83), slice(0, 83)),
    (slice(20, 70), slice(5, 33)),
    (slice(64, 83), slice(0, 64)),
    (slice(10, 11), slice(0, 83)),
    (slice(5, 9), slice(40, 83)),
    (slice(30, 80), slice(50, 60)),
    (slice(70, None), slice(-20, None)),
    (slice(7, 7), slice(0, 83)),
    (slice(3, 83), slice(9, 9)),
]


@pytest.mark.parametrize("bounds", ["whole", "both"])
def test_blocks_are_parts_of_dense(build: Build, formula: Formula, case: str, bounds: str) -> None:
    mixing = build(case, bounds=bounds)
    whole = formula(mixing)
    for rows, columns in SLICES:
        close(mixing.block(rows, columns), whole[:, :, rows, columns])


@pytest.mark.parametrize(("rows", "columns"), [(slice(0, 83), slice(0, 83)), (slice(20, 75), slice(5, 33))])
def test_gradients_of_blocks(build: Build, formula: Formula, case: str, rows: slice, columns: slice) -> None:
    mixing = build(case, bounds="left")
    inputs = [factor for factor in mixing.factors.values() if factor.requires_grad]
    expected = gradients(formula(mixing)[:, :, rows, columns], *inputs)
    for found, wanted in zip(gradients(mixing.block(rows, columns), *inputs), expected, strict=True):
        close(found, wanted)


def test_row_sums(build: Build, formula: Formula, case: str) -> None:
    mixing = build(case, bounds="both")
    close(mixing.row_sums(), formula(mixing).sum(-1).transpose(1, 2))


def test_a_single_token(build: Build, formula: Formula, case: str) -> None:
    mixing = build(case, time=1)
    close(mixing.dense(), formula(mixing))
    values = values_for(mixing, 3)
    close(mixing.apply(values), times(formula(mixing), values))


@pytest.mark.parametrize("bounds", ["both", "empty"])
def test_what_does_not_count_leaks_nowhere(build: Build, case: str, bounds: str) -> None:
    """NaN in factors and values of tokens that do not count: results and gradients stay those of clean ones."""
    mixing = build(case, bounds=bounds)
    values = values_for(mixing, 3).requires_grad_()
    counted = mixing.valid_mask()

    def spoil(tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != counted.shape:
            return tensor
        return tensor.masked_fill(~counted.view(*counted.shape, *[1] * (tensor.dim() - 2)), float("nan"))

    spoilt = mixing.map_factors(spoil)
    torch.testing.assert_close(spoilt.apply(spoil(values)), mixing.apply(values), rtol=0, atol=0)
    torch.testing.assert_close(spoilt.dense(), mixing.dense(), rtol=0, atol=0)
    inputs = [factor for factor in (*mixing.factors.values(), values) if factor.requires_grad]
    for gradient in gradients(spoilt.apply(spoil(values)), *inputs):
        assert gradient.isfinite().all()
    assert (mixing.apply(values)[~counted] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_factors_cost_no_more_than_their_rounding(
    build: Build, formula: Formula, case: str, dtype: torch.dtype
) -> None:
    """Factors of `dtype` with float32 values, against float64 of the same numbers.

    The budget is what the formula itself loses in float32, and 64 roundings of the largest result: a chunk's sum.
    """
    mixing = build(case, bounds="both", dtype=dtype)
    values = values_for(mixing, 5, torch.float32)
    entries, rounded = (formula(mixing.map_factors(wide)) for wide in (Tensor.double, Tensor.float))
    exact, by_formula = times(entries, values.double()), times(rounded, values)
    result = mixing.apply(values)
    assert result.dtype == torch.float32
    budget = 4 * (by_formula - exact).abs().max() + 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (result - exact).abs().max() <= budget
    assert mixing.block(slice(20, 83), slice(0, 60)).dtype == torch.float32
    loss = (rounded - entries).abs().max()
    room = 4 * loss + 64 * torch.finfo(torch.float32).eps * entries.abs().max()
    assert (mixing.dense() - entries).abs().max() <= room


def test_narrow_values_come_back_narrow(build: Build, formula: Formula, case: str) -> None:
    mixing = build(case, dtype=torch.bfloat16)
    values = values_for(mixing, 5, torch.bfloat16)
    result = mixing.apply(values)
    assert result.dtype == torch.bfloat16
    exact = times(formula(mixing.map_factors(Tensor.double)), values.double())
    # Attention kernels also round the weights of a row: two roundings of numbers of at most the largest magnitude.
    assert (result - exact).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_autocast_changes_nothing(build: Build, case: str) -> None:
    mixing = build(case, dtype=torch.float32)
    values = values_for(mixing, 5, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        applied, entries = mixing.apply(values), mixing.dense()
    torch.testing.assert_close(applied, mixing.apply(values), rtol=0, atol=0)
    torch.testing.assert_close(entries, mixing.dense(), rtol=0, atol=0)


@pytest.mark.parametrize("case", DECAYED)
@pytest.mark.parametrize("strength", [200.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strong_decay(build: Build, formula: Formula, case: str, strength: float, dtype: torch.dtype) -> None:
    """Every third token has decay to 0: nothing overflows and earlier tokens have weight 0."""
    mixing = build(case, dtype=dtype)
    every = torch.arange(mixing.time) % 3 == 0
    # A time step has no infinity; its decays are the time step times A.
    name, amount = ("dt", 200.0) if case.startswith("selective") else ("log_decay", -strength)

    def forget(tensor: Tensor) -> Tensor:
        if tensor is not mixing.factors[name]:
            return tensor
        return tensor.masked_fill(every.view(1, -1, *[1] * (tensor.dim() - 2)), amount)

    strong = mixing.map_factors(lambda factor: forget(factor).detach().requires_grad_())
    values = values_for(strong, 5, dtype)
    inputs = list(strong.factors.values())
    exact = strong.map_factors(lambda factor: factor.detach().double())
    expected = formula(exact)
    tolerance = EXACT if dtype == torch.float64 else 100 * torch.finfo(dtype).eps
    close(strong.dense().double(), expected, tolerance)
    close(strong.apply(values).double(), times(expected, values.double()), tolerance)
    for result in (strong.apply(values), strong.dense()):
        assert all(gradient.isfinite().all() for gradient in gradients(result, *inputs))


def test_long_sums_of_decays_keep_float32(build: Build) -> None:
    """After 4096 tokens of decay 1 a float32 running sum has steps of 2.4e-4; entries keep a rounding's distance."""
    mixing = build("recurrent-unit", batch=1, time=4096, dtype=torch.float32)
    entry = mixing.block(slice(4095, 4096), slice(4094, 4095)).squeeze()
    exact = torch.exp(mixing.factors["log_decay"][0, 4095].double()) * mixing.factors["dt"][0, 4094]
    assert ((entry - exact) / exact).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_dense_refuses_what_is_large(build: Build) -> None:
    mixing = build("ssd", batch=1, time=83)
    entries = 4 * 83**2
    assert mixing.dense(limit=entries).shape == (1, 4, 83, 83)
    with pytest.raises(UsageError, match=r"too large[\s\S]*limit=None"):
        mixing.dense(limit=entries - 1)
    large = build("recurrent-unit", batch=1, time=4097)
    assert 4 * large.time**2 > DENSE_LIMIT
    with pytest.raises(UsageError, match="too large"):
        large.dense()
    assert mixing.dense(limit=None).shape == (1, 4, 83, 83)


def test_detach_keeps_everything_but_the_graph(build: Build, case: str) -> None:
    mixing = build(case, bounds="both")
    detached = mixing.detach()
    assert not any(factor.requires_grad for factor in detached.factors.values())
    assert type(detached) is type(mixing)
    torch.testing.assert_close(detached.dense(), mixing.dense().detach(), rtol=0, atol=0)


def test_softmax_parts(build: Build, formula: Formula) -> None:
    mixing: Any = build("softmax-all", bounds="both")
    rows = slice(30, 83)
    normalizer = mixing.log_normalizer(rows)
    entries = (mixing.logits(rows, slice(0, 83)) - normalizer[..., None]).exp()
    close(entries, formula(mixing)[:, :, rows])
    seen = mixing.visible(rows, slice(0, 83)).expand_as(entries)
    assert torch.equal(seen, formula(mixing)[:, :, rows] > 0)
    dead = mixing.log_normalizer(slice(0, 2))
    close(dead[0], mixing.sinks[:, None].expand(-1, 2))
    without: Any = build("softmax", bounds="both")
    assert (without.log_normalizer(slice(0, 2))[0] == float("inf")).all()


def test_softmax_by_blocks_passes_the_gradient_check(build: Build, small_pieces: None) -> None:
    mixing: Any = build("softmax-all", time=20)
    names = list(mixing.factors)
    values = values_for(mixing, 3).requires_grad_()

    def applied(values: Tensor, *factors: Tensor) -> Tensor:
        given = iter(factors)
        return mixing.map_factors(lambda _: next(given)).apply(values)

    def normalized(*factors: Tensor) -> Tensor:
        given = iter(factors)
        return mixing.map_factors(lambda _: next(given)).log_normalizer(slice(3, 17))

    leaves = [mixing.factors[name] for name in names]
    assert torch.autograd.gradcheck(applied, (values, *leaves), fast_mode=True)
    assert torch.autograd.gradcheck(normalized, tuple(leaves), fast_mode=True)


def test_softmax_by_blocks_has_no_second_derivative(build: Build) -> None:
    mixing = build("softmax-capped", time=5)
    result = mixing.apply(values_for(mixing, 3)).sum()
    with pytest.raises(UsageError, match="second derivative"):
        torch.autograd.grad(result, [mixing.factors["query"]], create_graph=True)


@pytest.mark.parametrize("cut", [(0, 16, 3, 8), (5, 40, 11, 23), (17, 33, 0, 40), (0, 64, 0, 64)])
def test_split_blocks_take_every_pair_once(cut: tuple[int, int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(1, 1, 64, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    sums = -torch.rand(1, 1, 64, 3, generator=generator, dtype=torch.float64).cumsum(2)
    rows, columns = slice(cut[0], cut[1]), slice(cut[2], cut[3])
    found = decay.decayed_entries(
        left[:, :, rows], right[:, :, columns], sums[:, :, rows], sums[:, :, columns], rows, columns
    )
    weights = (sums[:, :, :, None] - sums[:, :, None]).exp()
    whole = (left[:, :, :, None] * right[:, :, None] * weights).sum(-1).tril()
    close(found, whole[:, :, rows, columns])


def test_autocast_changes_no_gradient_of_softmax_by_blocks(build: Build) -> None:
    mixing = build("softmax-all", dtype=torch.float32)
    values = values_for(mixing, 5, torch.float32)
    inputs = list(mixing.factors.values())
    expected = gradients(mixing.apply(values), *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(mixing.apply(values), *inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
