"""1 - CKA against the debiased formula on Gram matrices in float64, with small and masked batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.losses.cka import cka_loss
from xarch_kd.losses.standardize import FeatureStatistics, Standardizer
from xarch_kd.ops import similarity
from xarch_kd.testing.allocations import AllocationWatch

TOKENS = 40


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return a student [40, 6] with a part of the teacher's features [40, 9]."""
    teacher = normal(1, TOKENS, 9)
    return teacher @ normal(2, 9, 6) + 2 * normal(0, TOKENS, 6) + offset, teacher - offset


def centered(features: Tensor) -> Tensor:
    """Return the U-centered Gram matrix: each entry less its row's and column's mean, plus the whole mean."""
    n = features.shape[0]
    outside = 1 - torch.eye(n, dtype=features.dtype)
    gram = features @ features.T * outside
    means = gram.sum(0) / (n - 2)
    return (gram - means - means[:, None] + gram.sum() / ((n - 1) * (n - 2))) * outside


def dense(student: Tensor, teacher: Tensor) -> Tensor:
    own, target = centered(student), centered(teacher)
    return 1 - (own * target).sum() / (own.norm() * target.norm())


@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_value_and_gradient_equal_the_dense_formula(offset: float) -> None:
    student, teacher = pair(offset)
    own, again = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = cka_loss(own.view(4, 10, 6), teacher.view(4, 10, 9), normalizer=TOKENS)
    loss.backward()
    expected = dense(again, teacher)
    expected.backward()
    assert 0.1 < float(expected.detach()) < 0.9
    # Digits are lost where the formula subtracts Gram entries as large as the offset squared.
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(own.grad, again.grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(1 - loss.detach(), similarity(student, teacher).total, rtol=1e-10, atol=0)


def test_float32_keeps_its_digits_next_to_an_offset_and_a_massive_token() -> None:
    student, teacher = pair(20.0)
    student[3], teacher[3] = student[3] * 20, teacher[3] * 20
    exact, found = student.clone().requires_grad_(), student.float().requires_grad_()
    expected = dense(exact, teacher)
    expected.backward()
    loss = cka_loss(found, teacher.float(), normalizer=TOKENS)
    loss.backward()
    assert found.grad is not None and exact.grad is not None
    # Each token's product with itself is summed with those of all pairs and taken away again, and digits with it.
    own = max(
        float((x - x.mean(0)).square().sum(1).square().sum() / centered(x).square().sum())
        for x in (student.detach(), teacher)
    )
    band = 4 * torch.finfo(torch.float32).eps * own
    assert 1e-4 < band < 1e-2
    assert abs(float(loss.detach()) - float(expected.detach())) < band
    assert (found.grad.double() - exact.grad).norm() < 4 * band * exact.grad.norm()


def test_independent_features_have_a_loss_of_one_however_few_tokens() -> None:
    """The plain estimate would be 0.2 to 0.3 for 32 tokens of 64 dimensions."""
    values = [float(cka_loss(normal(3 * at, 32, 64), normal(3 * at + 1, 32, 64), normalizer=32)) for at in range(30)]
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / 29) ** 0.5
    assert abs(mean - 1) < 4 * spread / 30**0.5 and spread < 0.2


def test_micro_batches_add_up_to_the_mean_of_their_own_weighted_by_tokens() -> None:
    student, teacher = pair()
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[[1, 30, 31]] = False
    student[~mask], teacher[~mask] = float("nan"), float("inf")
    student.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for at in (slice(0, 25), slice(25, 40)):
        total = total + cka_loss(student[at], teacher[at], mask=mask[at], normalizer=mask.sum())
    total.backward()
    first, second = (dense(student[at][mask[at]], teacher[at][mask[at]]) for at in (slice(0, 25), slice(25, 40)))
    torch.testing.assert_close(total, (24 * first + 13 * second) / 37, rtol=1e-10, atol=0)
    assert student.grad is not None and torch.isfinite(student.grad).all() and not student.grad[~mask].any()


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_tokens_add_nothing(count: int) -> None:
    student, teacher = pair()
    student.requires_grad_()
    loss = cka_loss(student, teacher, mask=torch.arange(TOKENS) < count, normalizer=TOKENS)
    loss.backward()
    assert loss == 0 and student.grad is not None and not student.grad.any()


def test_the_gradient_neither_scales_nor_shifts_the_student() -> None:
    student, teacher = pair()
    student.requires_grad_()
    cka_loss(student, teacher, normalizer=TOKENS).backward()
    assert student.grad is not None and student.grad.norm() > 1e-3
    assert student.grad.sum(0).abs().max() < 1e-14 and (student.grad * student.detach()).sum().abs() < 1e-13


def test_features_that_do_not_vary_are_unlike_everything() -> None:
    _, teacher = pair()
    constant = torch.full((TOKENS, 6), 3.0, dtype=torch.float64, requires_grad=True)
    loss = cka_loss(constant, teacher, normalizer=TOKENS)
    loss.backward()
    assert abs(float(loss.detach()) - 1) < 1e-9 and constant.grad is not None and torch.isfinite(constant.grad).all()


def test_no_tensor_of_tokens_by_tokens() -> None:
    student, teacher = normal(0, 200, 6).requires_grad_(), normal(1, 200, 9)
    with AllocationWatch(lambda shape: shape.numel() > 200 * 9) as watch:
        cka_loss(student, teacher, normalizer=200).backward()
    assert watch.seen > 0 and not watch.found


def test_the_teacher_is_standardized_and_the_student_if_it_shares_the_basis() -> None:
    student, teacher = pair()
    scale = torch.logspace(-1, 1, 9, dtype=torch.float64)
    statistics = FeatureStatistics()
    statistics.update(teacher * scale)
    standardizer = statistics.standardizer()
    mean, deviation = (teacher * scale).mean(0), (teacher * scale).std(0, correction=0)
    found = cka_loss(student, teacher * scale, normalizer=TOKENS, standardizer=standardizer)
    torch.testing.assert_close(found, dense(student, (teacher * scale - mean) / deviation), rtol=1e-9, atol=0)
    wide = student @ normal(5, 6, 9)
    found = cka_loss(wide, teacher * scale, normalizer=TOKENS, standardizer=standardizer, shared_basis=True)
    expected = dense((wide - mean) / deviation, (teacher * scale - mean) / deviation)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    student, teacher = pair()
    statistics = Standardizer(torch.zeros(9), torch.ones(9))
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"mask": torch.ones(TOKENS)}, "boolean"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask does not fit"),
        ({"standardizer": statistics, "shared_basis": True}, "do not share their dimensions"),
        ({"standardizer": Standardizer(torch.zeros(6), torch.ones(6))}, "features does not fit"),
    )
    for options, words in refused:
        with pytest.raises(UsageError, match=words):
            cka_loss(student, teacher, normalizer=TOKENS, **options)
    with pytest.raises(UsageError, match="teacher does not fit"):
        cka_loss(student, teacher[:5], normalizer=TOKENS)
    student[4, 2] = float("nan")
    with pytest.raises(NonFiniteLoss, match="'cka' is not finite"):
        cka_loss(student, teacher, normalizer=TOKENS)
