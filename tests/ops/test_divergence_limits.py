"""Divergences where they are hard: distributions that hardly overlap, teachers without some tokens, small values."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.ops.test_linear_divergence import FORMULAS, IMPLEMENTATIONS
from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.losses.tokens import token_loss
from xarch_kd.ops import linear_divergence
from xarch_kd.ops.divergences import as_divergence
from xarch_kd.ops.heads import Head
from xarch_kd.ops.streaming.row_gradients import rows_with_gradient
from xarch_kd.ops.teacher import TeacherLogits

# Infinite where the teacher gives a token no probability. Adaptive KL has a part of reverse KL.
WITHOUT_LIMIT = ("reverse_kl", "jsd at 1", "alpha below 0", "adaptive_kl", "entropy_aware, sure")
MORE = {
    "alpha below 0": {"kind": "alpha", "alpha": -0.5},
    "entropy_aware": {"kind": "entropy_aware", "threshold": 0.0},
    "entropy_aware, sure": {"kind": "entropy_aware", "threshold": 9.0},
}


@pytest.mark.parametrize("gap", [35.0, 40.0, 100.0, 300.0])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_renyi_of_distributions_that_hardly_overlap_is_right(alpha: float, gap: float) -> None:
    """Student and teacher put all but e^-gap on different tokens: Σ p^a q^(1-a) = e^(-a g) + e^(-(1-a) g) + rest."""
    student, teacher = torch.tensor([[gap, 0.0, 0.0]]), torch.tensor([[0.0, gap, 0.0]])
    normalizer = math.log(math.exp(gap) + 2)
    terms = [
        alpha * t + (1 - alpha) * s - normalizer for s, t in zip(student[0].tolist(), teacher[0].tolist(), strict=True)
    ]
    top = max(terms)
    weights = [math.exp(term - top) for term in terms]
    expected = (top + math.log(sum(weights))) / (alpha - 1)
    q = [math.exp(value - normalizer) for value in student[0].tolist()]
    slope = torch.tensor([[own - weight / sum(weights) for own, weight in zip(q, weights, strict=True)]])
    divergence = as_divergence({"kind": "renyi", "alpha": alpha})
    value, gradient = rows_with_gradient(divergence, student, teacher.clone(), True)
    logits = student.clone().requires_grad_()
    dense = divergence.values(logits.log_softmax(-1), teacher.log_softmax(-1))
    dense.sum().backward()
    for found in (value, dense.detach()):
        torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-6, atol=0)
    for found in (gradient, logits.grad):
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*FORMULAS, "alpha below 0", "entropy_aware, sure"])
def test_a_teacher_without_some_tokens_gives_the_limit_or_is_refused(name: str) -> None:
    """Logits of -inf: the value and the gradient of -700, at which p is 0 in float64, or NonFiniteLoss."""
    divergence = MORE.get(name) or FORMULAS[name][0]
    generator = torch.Generator().manual_seed(2)
    hidden, head, teacher = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (9, 4), (6, 9))
    )
    teacher[:3] *= 4
    results: dict[tuple[str, float], tuple[Tensor, Tensor]] = {}
    for impl, low in product(IMPLEMENTATIONS, (-math.inf, -700.0)):
        given = teacher.clone()
        given[:, 2] = low
        student = hidden.clone().requires_grad_()
        if name in WITHOUT_LIMIT and low == -math.inf:
            with pytest.raises(NonFiniteLoss):
                linear_divergence(student, head, TeacherLogits(given), divergence=divergence, impl=impl)
            continue
        loss = linear_divergence(student, head, TeacherLogits(given), divergence=divergence, impl=impl)
        loss.total.backward()
        assert student.grad is not None
        results[impl, low] = (loss.total.detach(), student.grad)
    if name not in WITHOUT_LIMIT:
        for impl in IMPLEMENTATIONS:
            for found, limit in zip(results[impl, -math.inf], results[impl, -700.0], strict=True):
                torch.testing.assert_close(found, limit, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name not in ("jsd at 1", "jsd at 0")])
def test_small_values_keep_their_digits_and_are_never_negative(name: str) -> None:
    """Logits that float32 holds exactly, 2^-11 apart: a value of about 1e-8, to three digits."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randint(-2048, 2048, (8, 32), generator=generator) / 1024
    teacher = student + (torch.randint(0, 2, (8, 32), generator=generator) * 2 - 1) * 2.0**-11
    divergence = as_divergence(FORMULAS[name][0])
    expected, _ = rows_with_gradient(divergence, student.double(), teacher.double(), False)
    streamed, _ = rows_with_gradient(divergence, student, teacher.clone(), False)
    dense = divergence.values(student.log_softmax(-1), teacher.log_softmax(-1))
    assert (expected > 0).all() and (streamed >= 0).all() and (dense >= 0).all()
    torch.testing.assert_close(streamed.double(), expected, rtol=4e-3, atol=0)


def test_the_teachers_likeliest_tokens_are_compared_with_one_bucket_for_the_rest() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, weight, other, teacher = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((1, 5, 4), (19, 4), (1, 5, 6), (23, 6))
    )
    labels = torch.tensor([[1, 2, -100, 3, 4]])
    for kind in ("forward_kl", "reverse_kl"):
        loss = token_loss(
            hidden,
            Head(weight),
            other,
            Head(teacher),
            labels,
            normalizer=4.0,
            divergence=kind,
            temperature=1.5,
            top_k=3,
        )
        p = (other @ teacher[:19].T / 1.5).softmax(-1)
        q = (hidden @ weight.T / 1.5).softmax(-1)
        named = p.topk(3, -1)
        merged = [
            torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)
            for kept in (named.values, q.gather(-1, named.indices))
        ]
        rows = FORMULAS[kind][1](*merged)
        expected = 2.25 * rows[labels != -100].sum() / 4
        # The teacher's entries are kept in float32.
        torch.testing.assert_close(loss.total, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(UsageError, match="top_k leaves no token"):
        token_loss(hidden, Head(weight), other, Head(teacher), labels, normalizer=4.0, top_k=19)
