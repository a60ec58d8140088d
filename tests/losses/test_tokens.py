"""Token objective: valid positions, T², and micro-batches that add up to the whole batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.losses.tokens import Head, label_count, next_token_labels, token_loss
from xarch_kd.ops import Divergence, linear_divergence

ROWS, TIME, VOCABULARY = 8, 6, 23


def test_a_position_predicts_the_next_token_when_both_count() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert next_token_labels(ids).tolist() == [[6, 7, 8, -100], [2, 3, 4, -100]]
    assert next_token_labels(ids, mask).tolist() == [[6, 7, -100, -100], [-100, 3, 4, -100]]
    labels = torch.tensor([[-100, -100, 7, 8], [1, 2, 3, 4]])
    assert next_token_labels(ids, mask, labels=labels).tolist() == [[-100, 7, -100, -100], [-100, 3, 4, -100]]
    assert ids.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert label_count(next_token_labels(ids, mask)) == 4
    assert next_token_labels(ids[:, :1]).tolist() == [[-100], [-100]]


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, match="attention_mask"):
        next_token_labels(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4))
    with pytest.raises(UsageError, match=r"\[batch, time\]"):
        next_token_labels(torch.ones(3, dtype=torch.long))


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Head, Head]:
    """Return student and teacher hidden states, labels of rows of very different lengths, and both heads."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.randint(0, VOCABULARY, (ROWS, TIME), generator=generator)
    mask = torch.arange(TIME) < torch.tensor([6, 2, 1, 6, 3, 4, 1, 0])[:, None]
    student = Head(weight=normal(VOCABULARY, 5), bias=normal(VOCABULARY), scale=0.5)
    teacher = Head(weight=normal(VOCABULARY + 3, 7), softcap=4.0)
    return normal(ROWS, TIME, 5), normal(ROWS, TIME, 7), next_token_labels(ids, mask), student, teacher


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_four_micro_batches_of_two_equal_one_batch_of_eight(
    divergence: Any, dtype: torch.dtype, tolerance: float
) -> None:
    """The tolerance is some ten roundings; the last micro-batch has no label at all."""
    student, teacher, labels, student_head, teacher_head = batch(dtype)
    weight = student_head.weight.requires_grad_()
    results = []
    for size in (8, 2):
        inputs, weight.grad = student.clone().requires_grad_(), None
        sums = torch.zeros(3, dtype=dtype)
        for s, t, target in zip(inputs.split(size), teacher.split(size), labels.split(size), strict=True):
            loss = token_loss(
                s,
                student_head,
                t,
                teacher_head,
                target,
                normalizer=label_count(labels),
                divergence=divergence,
                temperature=1.5,
                cross_entropy=0.3,
            )
            loss.total.backward()
            sums += torch.stack([loss.total.detach(), loss.divergence, loss.cross_entropy])
        results.append((sums, inputs.grad, weight.grad))
    for whole, added in zip(*results, strict=True):
        assert whole is not None and added is not None
        assert (whole - added).abs().max() <= tolerance * whole.abs().max()


@pytest.mark.parametrize("squared", [True, False])
def test_the_value_is_a_mean_over_the_positions_that_count(squared: bool) -> None:
    student, teacher, labels, student_head, teacher_head = batch(torch.float64)
    loss = token_loss(
        student,
        student_head,
        teacher,
        teacher_head,
        labels,
        normalizer=label_count(labels),
        temperature=2.0,
        weight=0.7,
        cross_entropy=0.3,
        temperature_squared=squared,
    )
    counts = labels != -100
    assert student_head.bias is not None
    z = (0.5 * (student @ student_head.weight.T + student_head.bias))[counts]
    t = (4 * torch.tanh(teacher @ teacher_head.weight.T / 4))[counts][:, :VOCABULARY]
    p, q = (t / 2).softmax(-1), (z / 2).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    cross = torch.nn.functional.cross_entropy(z, labels[counts])
    torch.testing.assert_close(loss.divergence, divergence, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.cross_entropy, cross, rtol=1e-12, atol=0)
    expected = 0.7 * (4 if squared else 1) * divergence + 0.3 * cross
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)


def test_a_step_without_labels_has_no_loss() -> None:
    student, teacher, labels, student_head, teacher_head = batch(torch.float32)
    inputs = student.clone().requires_grad_()
    nothing = torch.full_like(labels, -100)
    loss = token_loss(inputs, student_head, teacher, teacher_head, nothing, normalizer=label_count(nothing))
    loss.total.backward()
    assert loss.total == 0 and inputs.grad is not None and torch.count_nonzero(inputs.grad) == 0


@pytest.mark.parametrize(
    "divergence", ["forward_kl", {"kind": "renyi", "alpha": 0.7}, Divergence(kind="jsd", beta=0.2)]
)
@pytest.mark.parametrize("logits_dtype", ["auto", "float32", "bfloat16"])
def test_divergence_and_logits_dtype_are_those_of_the_operation(divergence: Any, logits_dtype: str) -> None:
    student, teacher, labels, student_head, teacher_head = batch(torch.float32)
    how = {"divergence": divergence, "logits_dtype": logits_dtype}
    found = token_loss(student, student_head, teacher, teacher_head, labels, normalizer=label_count(labels), **how)
    wanted = linear_divergence(
        student,
        student_head,
        teacher,
        teacher_head,
        labels=labels,
        **how,
    )
    torch.testing.assert_close(found.divergence, wanted.divergence, rtol=1e-6, atol=0)
    exact = linear_divergence(
        student.double(),
        replace(student_head, weight=student_head.weight.double()),
        teacher.double(),
        replace(teacher_head, weight=teacher_head.weight.double()),
        labels=labels,
        divergence=divergence,
    )
    error = abs(float(found.divergence) / float(exact.divergence) - 1)
    # bfloat16 rounds logits of about 3 by 8e-3, float32 by 2e-7; sums of them stay within the larger.
    assert 1e-5 < error < 1e-2 if logits_dtype == "bfloat16" else error < 1e-5
