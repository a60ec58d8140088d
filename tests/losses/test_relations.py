"""Relations of tokens against reimplemented dense float64 formulas, with masks, without tokens × tokens in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.losses import blocks
from xarch_kd.losses.relations import gram_loss, relation_heads, relation_loss
from xarch_kd.losses.standardize import Standardizer
from xarch_kd.testing.allocations import AllocationWatch

BATCH, TIME = 3, 11
LENGTHS = (11, 4, 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_mask() -> Tensor:
    mask = torch.arange(TIME) < torch.tensor(LENGTHS)[:, None]
    mask[0, 5] = False
    return mask


def dense_gram(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for s, t, m in zip(student, teacher, mask, strict=True):
        own, target = s[m] @ s[m].T, t[m] @ t[m].T
        for k, expected in zip(own, target, strict=True):
            total = total + ((k / k.norm() - expected / expected.norm()) ** 2).sum()
    return total / mask.sum()


def dense_relation(student: Tensor, teacher: Tensor, mask: Tensor, heads: int, causal: bool) -> Tensor:
    """Loops over sequences, heads and rows, over valid tokens only."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t, m in zip(student, teacher, mask, strict=True):
        own, target = s.reshape(TIME, -1)[m], t.reshape(TIME, -1)[m]
        for x, y in zip(own.chunk(heads, -1), target.chunk(heads, -1), strict=True):
            for i in range(x.shape[0]):
                seen = slice(0, i + 1) if causal else slice(None)
                q = torch.softmax(x[seen] @ x[i] / x.shape[1] ** 0.5, 0)
                p = torch.softmax(y[seen] @ y[i] / y.shape[1] ** 0.5, 0)
                total = total + (p * (p.log() - q.log())).sum()
    return total / heads / mask.sum()


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("masked", [True, False])
def test_gram_equals_its_formula(masked: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", rows * BATCH * TIME)
    mask = some_mask() if masked else torch.ones(BATCH, TIME, dtype=torch.bool)
    teacher = normal(1, BATCH, TIME, 9)
    student, again = normal(0, BATCH, TIME, 6).requires_grad_(), normal(0, BATCH, TIME, 6).requires_grad_()
    loss = gram_loss(student, teacher, normalizer=mask.sum(), mask=mask if masked else None)
    (2 * loss).backward()
    expected = dense_gram(again, teacher, mask)
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, again.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shared_basis", [True, False])
def test_gram_of_standardized_features(shared_basis: bool) -> None:
    mask, teacher = some_mask(), normal(1, BATCH, TIME, 9)
    mean, deviation = 5 * normal(2, 9), normal(3, 9).abs() + 0.1
    student, again = normal(0, BATCH, TIME, 9).requires_grad_(), normal(0, BATCH, TIME, 9).requires_grad_()
    poisoned = torch.where(mask[..., None], teacher, torch.full((), float("nan"), dtype=torch.float64))
    options: dict[str, Any] = {"standardizer": Standardizer(mean, deviation), "shared_basis": shared_basis}
    loss = gram_loss(student, poisoned, normalizer=mask.sum(), mask=mask, **options)
    loss.backward()
    own = (again - mean) / deviation if shared_basis else again
    expected = dense_gram(own, (teacher - mean) / deviation, mask)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, again.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_relations_of_unequal_heads_equal_their_formula(
    causal: bool, heads: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", rows * BATCH * heads * TIME)
    mask, teacher = some_mask(), normal(1, BATCH, TIME, 6, 10)
    student, again = normal(0, BATCH, TIME, 8, 4).requires_grad_(), normal(0, BATCH, TIME, 8, 4).requires_grad_()
    loss = relation_loss(student, teacher, normalizer=mask.sum(), mask=mask, heads=heads, causal=causal)
    (2 * loss).backward()
    expected = dense_relation(again, teacher, mask, heads, causal)
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, again.grad, rtol=1e-10, atol=1e-14)


def gram(student: Tensor, teacher: Tensor, mask: Tensor, normalizer: Tensor) -> Tensor:
    return gram_loss(student.flatten(2), teacher.flatten(2), mask=mask, normalizer=normalizer)


def relation(student: Tensor, teacher: Tensor, mask: Tensor, normalizer: Tensor) -> Tensor:
    return relation_loss(student, teacher, mask=mask, normalizer=normalizer)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
both = pytest.mark.parametrize("loss", [gram, relation])


@both
def test_what_does_not_count_may_hold_anything_and_micro_batches_add_up(loss: Loss) -> None:
    mask, count = some_mask(), some_mask().sum()
    student, teacher = normal(0, BATCH, TIME, 2, 4).requires_grad_(), normal(1, BATCH, TIME, 3, 4)
    whole = loss(student, teacher, mask, count)
    (expected,) = torch.autograd.grad(whole, student)
    poison = torch.full((), float("nan"), dtype=torch.float64)
    own = torch.where(mask[..., None, None], student.detach(), poison).requires_grad_()
    target = torch.where(mask[..., None, None], teacher, poison)
    pieces = [loss(own[at : at + 1], target[at : at + 1], mask[at : at + 1], count) for at in range(BATCH)]
    torch.stack(pieces).sum().backward()
    torch.testing.assert_close(torch.stack(pieces).sum(), whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(own.grad, expected, rtol=1e-12, atol=1e-16)
    assert own.grad is not None and not own.grad[~mask].any()
    nothing = loss(own, target, torch.zeros_like(mask), torch.zeros(()))
    nothing.backward()
    assert nothing == 0


@both
def test_equal_features_have_no_loss_and_no_gradient(loss: Loss) -> None:
    student = normal(0, BATCH, TIME, 2, 4).requires_grad_()
    value = loss(student, student.detach(), some_mask(), some_mask().sum())
    value.backward()
    assert value == 0 and student.grad is not None and student.grad.abs().max() < 1e-15


@both
def test_a_feature_that_counts_must_be_finite_and_the_teacher_learns_nothing(loss: Loss) -> None:
    student, teacher = normal(0, BATCH, TIME, 2, 4).requires_grad_(), normal(1, BATCH, TIME, 2, 4).requires_grad_()
    loss(student, teacher, some_mask(), some_mask().sum()).backward()
    assert teacher.grad is None and student.grad is not None
    with torch.no_grad():
        assert not loss(student, teacher, some_mask(), some_mask().sum()).requires_grad
        student[0, 0] = float("inf")
    with pytest.raises(NonFiniteLoss, match="not finite"):
        loss(student, teacher, some_mask(), some_mask().sum())


@both
def test_narrow_features_under_autocast_are_compared_wide(loss: Loss) -> None:
    student, teacher = normal(0, BATCH, TIME, 2, 4).bfloat16().requires_grad_(), normal(1, BATCH, TIME, 2, 4).bfloat16()
    expected = loss(student.double(), teacher.double(), some_mask(), some_mask().sum())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student, teacher, some_mask(), some_mask().sum())
    found.backward()
    assert found.dtype == torch.float32 and student.grad is not None and student.grad.dtype == torch.bfloat16
    # Sums of a dozen float32 products of size 1.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@both
def test_no_tensor_of_tokens_by_tokens(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    time = 257
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", 8 * time)
    student, teacher = normal(0, 1, time, 2, 4).requires_grad_(), normal(1, 1, time, 2, 4)
    mask = torch.ones(1, time, dtype=torch.bool)
    with AllocationWatch(lambda shape: shape.numel() > 24 * time) as watch:
        loss(student, teacher, mask, mask.sum()).backward()
    assert watch.seen > 0 and not watch.found


def test_a_causal_relation_starts_with_a_row_of_one_token() -> None:
    student, teacher = normal(0, 1, 1, 2, 4).requires_grad_(), normal(1, 1, 1, 2, 4)
    assert relation_loss(student, teacher, normalizer=1.0) == 0


def test_relation_heads() -> None:
    assert [relation_heads(*dims) for dims in ((256, 576), (768, 768), (48, 60), (16, 2048))] == [8, 24, 1, 1]
    assert relation_heads(32, 60, 4) == 4
    with pytest.raises(UsageError, match=r"(?s)asked: +8.*student 32, teacher 60.*1 \| 2 \| 4"):
        relation_heads(32, 60, 8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: relation_loss(x.flatten(2), x, normalizer=1.0), "student does not fit"),
        (lambda x: relation_loss(x, x[:, :3], normalizer=1.0), "teacher does not fit"),
        (lambda x: gram_loss(x.flatten(2), x, normalizer=1.0), "teacher does not fit"),
        (lambda x: gram_loss(x[:, :, 0], x[:, :, 0], normalizer=1.0, mask=torch.ones(BATCH, 3).bool()), "mask"),
        (lambda x: gram_loss(x[:, :, 0], x[:, :, 0], normalizer=1.0, mask=torch.ones(BATCH, TIME)), "boolean"),
        (lambda x: gram_loss(x[:, :, 0].long(), x[:, :, 0], normalizer=1.0), "floating point"),
        (
            lambda x: gram_loss(
                x.flatten(2),
                x[:, :, 0],
                normalizer=1.0,
                standardizer=Standardizer(torch.zeros(4), torch.ones(4)),
                shared_basis=True,
            ),
            "do not share their dimensions",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call(normal(0, BATCH, TIME, 2, 4))
