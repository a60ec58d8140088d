"""The sketch of `mixing_distance`: no bias, a standard error that holds, the exact gradient of the estimate."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.mixing_formulas import (
    BATCH,
    PADDED,
    TIME,
    built,
    head_weights,
    make_softmax,
    make_ssd,
    other_student,
    some_mask,
    ssd_pair,
)
from xarch_kd.errors import UsageError
from xarch_kd.mixing import Mixing, SoftmaxMixing, SSDMixing
from xarch_kd.ops import mixing_distance, sketch
from xarch_kd.ops.mixing_inputs import check_inputs


def shortened(mixing: Mixing, tokens: int) -> Mixing:
    """Return the mixing of the first tokens."""

    def cut(factor: Tensor) -> Tensor:
        cut_to = factor.detach()
        return (cut_to[:, :tokens] if factor.shape[:2] == (BATCH, TIME) else cut_to).clone().requires_grad_()

    return mixing.map_factors(cut)


def every_sign(tokens: int) -> Tensor:
    """Return all sign vectors [batch, tokens, 2^tokens], the same for every sequence."""
    signs = torch.tensor(list(itertools.product((-1, 1), repeat=tokens)), dtype=torch.int8)
    return signs.T.expand(BATCH, -1, -1).contiguous()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_the_mean_over_all_signs_is_the_distance(reduction: str, chunk_size: int | None) -> None:
    tokens = 5
    teacher, student, head_map = ssd_pair("two groups", torch.float64)
    teacher, student = shortened(teacher, tokens), shortened(student, tokens)
    mask = some_mask()[:, :tokens]
    inputs = check_inputs(student, teacher, distance="frobenius", head_map=head_map, mask=mask, epsilon=1e-8)
    weights = inputs.valid_mask[..., None].double()
    if reduction == "mean":
        weights /= inputs.valid_mask.sum() * student.heads
    found, _ = sketch.estimate(inputs, every_sign(tokens), weights, reduction, chunk_size)
    expected = mixing_distance(
        student, teacher, distance="frobenius", head_map=head_map, mask=mask, reduction=reduction, impl="reference"
    ).total
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.linspace(0.5, 2, found.numel(), dtype=torch.float64).view(found.shape)
    factors = list(student.factors.values())
    mine = torch.autograd.grad((found * upstream).sum(), factors)
    theirs = torch.autograd.grad((expected * upstream).sum(), factors)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_the_standard_error_covers_the_distance_as_often_as_it_says(chunk_size: int | None) -> None:
    teacher, student, head_map = ssd_pair("padded", torch.float64)
    options = {"distance": "frobenius", "head_map": head_map, "mask": some_mask()}
    with torch.no_grad():
        exact = mixing_distance(student, teacher, impl="reference", **options).total.item()
        inside, errors = 0, []
        for seed in range(200):
            found = mixing_distance(
                student, teacher, impl="sketch", probes=32, seed=seed, chunk_size=chunk_size, **options
            )
            assert found.standard_error is not None
            errors.append(found.total.item() - exact)
            inside += abs(errors[-1]) <= 2 * float(found.standard_error)
    # 2 standard errors hold 95 % of a bell's draws, somewhat fewer of 32 skewed ones; the count spreads by 3.5.
    assert 170 <= inside <= 199
    spread = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    assert abs(sum(errors) / len(errors)) < 4 * spread / len(errors) ** 0.5


def test_more_probes_and_the_same_seed() -> None:
    teacher, student, head_map = ssd_pair("two groups", torch.float64)

    def run(probes: int, seed: int | torch.Generator | None) -> tuple[float, float]:
        found = mixing_distance(
            student, teacher, distance="frobenius", head_map=head_map, impl="sketch", probes=probes, seed=seed
        )
        assert found.standard_error is not None and not found.standard_error.requires_grad
        return found.total.item(), float(found.standard_error)

    # 16 times the probes: a quarter of the standard error; its own estimate from 64 spreads by about a tenth.
    assert 3 < run(64, 0)[1] / run(1024, 0)[1] < 5.5
    assert run(8, 3) == run(8, 3) == run(8, torch.Generator().manual_seed(3))
    assert run(8, 3) != run(8, 4)
    assert run(8, None) != run(8, None)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_probes_may_be_applied_a_few_at_a_time(reduction: str) -> None:
    teacher, student, head_map = ssd_pair("padded", torch.float64)
    whole, parts = (
        mixing_distance(
            student,
            teacher,
            distance="frobenius",
            head_map=head_map,
            reduction=reduction,
            impl="sketch",
            probes=13,
            seed=0,
            chunk_size=chunk_size,
        )
        for chunk_size in (None, 3)
    )
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(parts.standard_error, whole.standard_error, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_is_that_of_the_estimate(reduction: str) -> None:
    teacher, student, head_map = ssd_pair("padded", torch.float64)
    found = mixing_distance(
        student, teacher, distance="frobenius", head_map=head_map, reduction=reduction, impl="sketch", probes=3, seed=5
    )
    inputs = check_inputs(student, teacher, distance="frobenius", head_map=head_map, mask=None, epsilon=1e-8)
    signs = sketch.draw_signs(inputs, 3, 5).double()
    assert set(signs.unique().tolist()) == {-1, 1}
    target = torch.einsum("st,btij->bsij", head_map, teacher.dense().detach())
    rows = torch.einsum("bsij,bjp->bsip", target - student.dense(), signs).square().mean(-1).transpose(1, 2)
    valid = inputs.valid_mask[..., None]
    expected = rows if reduction == "none" else (rows * valid).sum() / (valid.sum() * 4)
    torch.testing.assert_close(found.total, expected * (valid if reduction == "none" else 1))
    assert found.standard_error is not None and found.standard_error.shape == found.total.shape
    upstream = torch.linspace(0.5, 2, found.total.numel(), dtype=torch.float64).view(found.total.shape)
    factors = list(student.factors.values())
    mine = torch.autograd.grad((found.total * upstream).sum(), factors)
    kept = valid if reduction == "none" else 1
    theirs = torch.autograd.grad((expected * kept * upstream).sum(), factors)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "gated linear", "banded", "selective", "delta"])
def test_any_mixer_has_a_sketch(name: str) -> None:
    student = other_student(name, torch.float64)
    teacher = built(SoftmaxMixing, make_softmax(0, 2, 1, 5), torch.float64, False, scale=0.7, **PADDED)
    options = {"distance": "frobenius", "head_map": head_weights(3, 2)}
    exact = mixing_distance(student, teacher, impl="reference", **options).total.item()
    found = mixing_distance(student, teacher, impl="sketch", probes=512, seed=0, **options)
    assert found.standard_error is not None
    assert abs(found.total.item() - exact) < 4 * float(found.standard_error)
    found.total.backward()
    assert all(factor.grad is not None for factor in student.factors.values())


@pytest.mark.parametrize("distance", ["cosine", "relative_frobenius"])
def test_other_distances_have_none(distance: Any) -> None:
    teacher, student, head_map = ssd_pair("two groups", torch.float64)
    with pytest.raises(UsageError, match="without bias"):
        mixing_distance(student, teacher, distance=distance, head_map=head_map, impl="sketch")


@pytest.mark.parametrize("probes", [1, 0, -3])
def test_fewer_than_two_probes_have_no_spread(probes: int) -> None:
    student = built(SSDMixing, make_ssd(10, 2, 2), torch.float64, False)
    teacher = built(SSDMixing, make_ssd(0, 2, 2), torch.float64, False)
    with pytest.raises(UsageError, match="needs a spread"):
        mixing_distance(student, teacher, distance="frobenius", impl="sketch", probes=probes)
