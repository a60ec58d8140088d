"""Maps between unequal counts of heads."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from xarch_kd.errors import UsageError
from xarch_kd.projectors import HeadMap, assignment, head_costs, head_map


def test_equal_counts_need_no_map() -> None:
    assert [head_map(rule, 3, 3) for rule in ("auto", "mean", "repeat")] == [None] * 3


@pytest.mark.parametrize("rule", ["auto", "mean"])
def test_a_student_head_learns_from_the_mean_of_a_group(rule: str) -> None:
    found = head_map(rule, 2, 4)
    assert found is not None
    assert torch.equal(found, torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]))


@pytest.mark.parametrize("rule", ["auto", "repeat"])
def test_a_teacher_head_teaches_a_group(rule: str) -> None:
    found = head_map(rule, 4, 2)
    assert found is not None
    assert torch.equal(found, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))


def test_weights_as_written_are_made_to_sum_to_one() -> None:
    found = head_map([[0.333, 0.333, 0.333]], 1, 3)
    assert found is not None
    assert torch.allclose(found, torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize(
    ("rule", "counts", "message"),
    [
        ("auto", (4, 6), "do not allow this rule"),
        ("mean", (4, 2), "do not allow this rule"),
        ("repeat", (2, 4), "do not allow this rule"),
        ("maen", (2, 4), "Did you mean 'mean'"),
        ([[1.0, 0.0]], (2, 2), "1 rows of 2 weights"),
        ([[1.0], [0.5, 0.5]], (2, 2), "2 rows of 1, 2 weights"),
        ([[1.0, 0.0], [0.0, 0.0]], (2, 2), "row 1 sums to 0"),
        ([[1.5, -0.5], [0.0, 1.0]], (2, 2), "must not be negative"),
    ],
)
def test_what_does_not_fit_is_an_error(rule: Any, counts: tuple[int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        head_map(rule, *counts)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cheapest(costs: torch.Tensor, least: int, most: int) -> float:
    """Return the least sum over all ways to give each row a column that takes each column `least` to `most` times."""
    rows, columns = costs.shape
    found = float("inf")
    for chosen in product(range(columns), repeat=rows):
        if all(least <= chosen.count(column) <= most for column in range(columns)):
            found = min(found, float(costs[torch.arange(rows), list(chosen)].sum()))
    return found


@pytest.mark.parametrize(
    ("students", "teachers", "every", "least", "most"),
    [
        (4, 4, False, 1, 1),
        (4, 2, False, 2, 2),
        (5, 3, False, 1, 2),
        (7, 3, False, 2, 3),
        (2, 5, False, 0, 1),
        (3, 5, True, 1, 2),
        (2, 6, True, 3, 3),
    ],
)
def test_assignment_is_the_cheapest_of_all(students: int, teachers: int, every: bool, least: int, most: int) -> None:
    for seed in range(3):
        costs = draw(students, teachers, seed=seed)
        weights = assignment(costs, every_teacher=every)
        assert torch.allclose(weights.sum(1), torch.ones(students)) and bool((weights >= 0).all())
        searched = costs.T if every else costs
        assert float((costs * (weights > 0)).sum()) == pytest.approx(cheapest(searched, least, most), abs=1e-12)
        counts = (weights > 0).sum(1 if every else 0)
        assert int(counts.min()) >= least and int(counts.max()) <= most


def test_assignments_that_there_are_not() -> None:
    costs = draw(3, 3)
    costs[1] = torch.inf
    with pytest.raises(UsageError, match="no such assignment"):
        assignment(costs)
    costs[1, 0] = 0
    assert assignment(costs)[1, 0] == 1
    costs[0, 0] = torch.nan
    for wrong in (costs, draw(3), draw(0, 3)):
        with pytest.raises(UsageError, match="costs do not fit"):
            assignment(wrong)


def test_permuted_heads_are_found_again() -> None:
    teacher, order = draw(2, 6, 4, 5), [2, 0, 3, 1]
    student = 3 * teacher[:, :, order] + 0.1 * draw(2, 6, 4, 5, seed=1)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    student[~mask] = torch.nan
    costs = head_costs(student, teacher, mask)
    assert torch.equal(assignment(costs), torch.eye(4)[order])
    kept = teacher[mask].transpose(0, 1).flatten(1), student[mask].transpose(0, 1).flatten(1)
    dense = 1 - torch.cosine_similarity(kept[1][:, None], kept[0][None], dim=2)
    torch.testing.assert_close(costs, dense, rtol=0, atol=1e-12)
    student[:, :, 2] = 0
    assert torch.equal(head_costs(student, teacher, mask)[2], torch.ones(4).double())


def test_learned_weights_stay_on_the_simplex_and_find_the_mixture() -> None:
    teacher = draw(2, 20, 3, 4)
    truth = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    student = (5 * torch.einsum("st,bntw->bnsw", truth, teacher)).requires_grad_()
    heads = HeadMap(2, 3)
    weights = heads.weights().detach()
    assert torch.allclose(weights, torch.full((2, 3), 1 / 3))
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.3)
    for _ in range(150):
        optimizer.zero_grad()
        objective = heads(student, teacher)
        objective.backward()
        optimizer.step()
        weights = heads.weights().detach()
        assert bool((weights >= 0).all())
        # A softmax in float32.
        torch.testing.assert_close(weights.sum(1), torch.ones(2), rtol=0, atol=1e-6)
    assert student.grad is None and {name for name, _ in heads.named_parameters()} == {"logits"}
    # A softmax comes near to weights of 0 only slowly.
    torch.testing.assert_close(weights.double(), truth, rtol=0, atol=0.05)


def test_the_objective_is_the_mean_distance_from_the_mixture() -> None:
    student, teacher = draw(2, 6, 2, 5), draw(2, 6, 3, 5, seed=1)
    mask = torch.tensor([[True] * 6, [True, False] * 3])
    heads = HeadMap(2, 3, initial=torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]]))
    expected = torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3], [0.1 / 3, 0.45 + 0.1 / 3, 0.45 + 0.1 / 3]])
    torch.testing.assert_close(heads.weights().detach(), expected)
    mixed = torch.einsum("st,bntw->bnsw", heads.weights().double(), teacher)
    cosines = [torch.cosine_similarity(student[mask][:, i].flatten(), mixed[mask][:, i].flatten(), 0) for i in (0, 1)]
    dense = 1 - (cosines[0] + cosines[1]) / 2
    streamed = heads(student, teacher, mask)
    torch.testing.assert_close(streamed, dense, rtol=1e-10, atol=0)
    wanted = torch.autograd.grad(dense, heads.logits)[0]
    torch.testing.assert_close(torch.autograd.grad(streamed, heads.logits)[0], wanted, rtol=1e-5, atol=1e-7)
    student[:, :, 0] = 0
    assert torch.isfinite(torch.autograd.grad(heads(student, teacher), heads.logits)[0]).all()


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="initial does not fit"):
        HeadMap(2, 3, initial=torch.eye(2))
    with pytest.raises(UsageError, match="must not be negative"):
        HeadMap(2, 2, initial=torch.tensor([[1.0, 0], [0, 0]]))
    with pytest.raises(UsageError, match="teacher does not fit"):
        head_costs(draw(2, 6, 2, 5), draw(2, 6, 2, 4))
