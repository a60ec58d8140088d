"""Names, parameters and ranges of divergences, and divergences of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.flat import flat_divergence
from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.ops import Divergence, DivergenceFormula
from xarch_kd.ops.divergences import as_divergence
from xarch_kd.ops.teacher import TeacherTopK

IMPLEMENTATIONS = ("reference", "streaming")


def squared_hellinger(log_q: Tensor, log_p: Tensor) -> Tensor:
    return 1 - torch.exp((log_q + log_p) / 2).sum(-1)


HELLINGER = DivergenceFormula(name="hellinger", values=squared_hellinger)


def draw() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states and heads of student and teacher in float64; the student's two train."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 6), (31, 6), (2, 7, 5), (31, 5))
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2], tensors[3]


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


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_divergence_of_ones_own_equals_its_closed_form(impl: str, reduction: Any) -> None:
    """Σ (√p - √q)² / 2 in float64, chunk by chunk, at a temperature and with labels, values and gradients."""
    ours, theirs = draw(), draw()
    labels = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"temperature": 1.5, "labels": labels, "cross_entropy": 0.3, "divergence_weight": 0.7}
    total = flat_divergence(*ours, divergence=HELLINGER, impl=impl, chunk_size=3, reduction=reduction, **options).total
    student, teacher = (torch.einsum("btd,vd->btv", *theirs[at : at + 2]) for at in (0, 2))
    roots = [(logits / 1.5).softmax(-1).sqrt() for logits in (student, teacher)]
    cross = -student.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    rows = 0.7 * (roots[0] - roots[1]).square().sum(-1) / 2 + 0.3 * cross
    expected = rows.mean() if reduction == "mean" else rows
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-13)
    total.sum().backward()
    expected.sum().backward()
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_divergence_of_ones_own_compares_the_buckets_of_a_top_k(impl: str) -> None:
    hidden, weight, teacher_hidden, teacher_weight = draw()
    top = TeacherTopK.from_logits(teacher_hidden @ teacher_weight.T, 4)
    total = flat_divergence(hidden, weight, teacher_top_k=top, divergence=HELLINGER, impl=impl).total
    q, p = (hidden @ weight.T).softmax(-1), (teacher_hidden @ teacher_weight.T).softmax(-1)
    named = [probabilities.gather(-1, top.indices) for probabilities in (q, p)]
    both = [torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1).sqrt() for part in named]
    expected = (both[0] - both[1]).square().sum(-1).mean() / 2
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-13)
    found, wanted = torch.autograd.grad(total, hidden)[0], torch.autograd.grad(expected, hidden)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (lambda log_q, log_p: log_q - log_p, UsageError, ["'mine'", "wrong shape", "last axis"]),
        (lambda log_q, log_p: 0.0, UsageError, ["wrong shape", "float"]),
        (lambda log_q, log_p: (log_q.detach() - log_p).sum(-1), UsageError, ["no gradient", "detach"]),
        (lambda log_q, log_p: (log_q - log_p).sum(-1) * torch.nan, NonFiniteLoss, ["not finite"]),
    ],
)
def test_a_formula_that_does_not_fit_is_refused(
    values: Callable[..., Any], error: type[Exception], words: list[str], impl: str
) -> None:
    with pytest.raises(error) as caught:
        flat_divergence(*draw(), divergence=DivergenceFormula(name="mine", values=values), impl=impl)
    for word in words:
        assert word in str(caught.value)


def test_a_formula_names_its_sides_and_has_no_kernel_of_its_own() -> None:
    with pytest.raises(UsageError, match="log_q and log_p"):
        DivergenceFormula(name="mine", values=lambda q, p: (q - p).sum(-1))
    with pytest.raises(UsageError, match="no kernel for the divergence 'hellinger'"):
        flat_divergence(*draw(), divergence=HELLINGER, impl="fused")
