"""Feature objectives: micro-batches add up to the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.losses.features import LOSSES, feature_loss, feature_normalizer, teacher_energy, token_count
from xarch_kd.projectors import LinearProjector

ROWS, TIME, STUDENT_WIDTH, TEACHER_WIDTH = 8, 5, 6, 9


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return student, teacher and a mask whose rows have very different numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(ROWS, TIME, STUDENT_WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    scale = torch.logspace(-1, 1, ROWS, dtype=torch.float64)[:, None, None]
    teacher = (torch.randn(ROWS, TIME, TEACHER_WIDTH, generator=generator, dtype=torch.float64) * scale).to(dtype)
    lengths = torch.tensor([5, 1, 0, 5, 2, 3, 0, 0])
    return student, teacher, torch.arange(TIME) < lengths[:, None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("kind", LOSSES)
def test_four_micro_batches_of_two_equal_one_batch_of_eight(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """The tolerance is some ten roundings; the last micro-batch has no token at all."""
    student, teacher, mask = batch(dtype)
    projector = LinearProjector(STUDENT_WIDTH, TEACHER_WIDTH, bias=True).to(dtype)
    results = []
    for size in (8, 2):
        inputs = student.clone().requires_grad_()
        projector.zero_grad()
        pieces = list(zip(inputs.split(size), teacher.split(size), mask.split(size), strict=True))
        normalizer = torch.stack([feature_normalizer(kind, t, m) for _, t, m in pieces]).sum()
        total = torch.zeros((), dtype=dtype)
        for s, t, m in pieces:
            loss = feature_loss(kind, s, t, normalizer=normalizer, mask=m, projector=projector)
            loss.backward()
            total += loss.detach()
        assert projector.weight.grad is not None and inputs.grad is not None
        results.append((total, inputs.grad, projector.weight.grad.clone()))
    for whole, added in zip(*results, strict=True):
        assert (whole - added).abs().max() <= tolerance * whole.abs().max()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_value_is_the_mean_over_tokens_or_the_ratio_of_sums(kind: str) -> None:
    _, teacher, mask = batch(torch.float64)
    student = teacher * torch.linspace(0.5, 2, ROWS, dtype=torch.float64)[:, None, None]
    loss = feature_loss(
        kind, student, teacher, normalizer=feature_normalizer(kind, teacher, mask), mask=mask, epsilon=0.0
    )
    y, t = student[mask], teacher[mask]
    expected = {
        "mse": ((y - t) ** 2).mean(),
        "relative_mse": ((y - t) ** 2).sum() / (t**2).sum(),
        "cosine": torch.zeros((), dtype=torch.float64),
        "normalised_mse": (((y - t) ** 2).sum(-1) / (t**2).sum(-1)).mean(),
        "huber": torch.where((y - t).abs() > 1, (y - t).abs() - 0.5, (y - t) ** 2 / 2).mean(),
        "l2": ((y - t) ** 2).sum(-1).sqrt().mean(),
    }[kind]
    # The energy is added up from float32 squares.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-13)


def test_huber_turns_at_delta() -> None:
    student, teacher, mask = batch(torch.float64)
    student = student.new_zeros(teacher.shape)
    loss = feature_loss("huber", student, teacher, normalizer=token_count(teacher, mask), mask=mask, delta=0.3)
    gap = teacher[mask].abs()
    expected = torch.where(gap > 0.3, 0.3 * (gap - 0.15), gap**2 / 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_counts_and_energies() -> None:
    _, teacher, mask = batch(torch.float32)
    assert token_count(teacher) == ROWS * TIME
    assert token_count(teacher, mask) == 16
    torch.testing.assert_close(teacher_energy(teacher, mask), (teacher[mask].double() ** 2).sum(), rtol=1e-6, atol=0)
    poisoned = teacher.masked_fill(~mask[..., None], float("nan"))
    assert torch.equal(teacher_energy(poisoned, mask), teacher_energy(teacher, mask))
    assert teacher_energy(poisoned.requires_grad_()).requires_grad is False


@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_without_tokens_has_no_loss(kind: str) -> None:
    student, teacher, mask = batch(torch.float32)
    inputs = student[..., :4].clone().requires_grad_()
    loss = feature_loss(kind, inputs, teacher[..., :4], normalizer=0.0, mask=torch.zeros_like(mask))
    loss.backward()
    assert loss == 0 and inputs.grad is not None and torch.count_nonzero(inputs.grad) == 0


def test_an_unknown_loss_is_refused() -> None:
    student, teacher, _ = batch(torch.float32)
    with pytest.raises(UsageError, match="Did you mean 'cosine'"):
        feature_loss("cosin", student, teacher, normalizer=1.0)
    with pytest.raises(UsageError, match="relative_mse"):
        feature_normalizer("relative", teacher)
