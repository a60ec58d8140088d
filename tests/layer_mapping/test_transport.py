from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping import transport_plan
from xarch_kd.layer_mapping.transport import optimal_transport


def random_cost(students: int, teachers: int, seed: int = 0) -> Tensor:
    return torch.rand(students, teachers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assigned(cost: Tensor, students: list[int], teachers: list[int]) -> Tensor:
    """The exact plan for whole shares: each layer is as many units as its share, assigned one to one."""
    rows = torch.arange(len(students)).repeat_interleave(torch.tensor(students))
    columns = torch.arange(len(teachers)).repeat_interleave(torch.tensor(teachers))
    own, other = linear_sum_assignment(cost[rows][:, columns].numpy())
    plan = torch.zeros_like(cost)
    plan.index_put_((rows[own], columns[other]), torch.tensor(1.0, dtype=cost.dtype), accumulate=True)
    return plan / sum(students)


@pytest.mark.parametrize(("students", "teachers"), [(1, 1), (1, 5), (3, 3), (4, 6), (5, 3), (3, 7), (12, 30)])
def test_the_exact_plan_is_the_best_assignment_of_units(students: int, teachers: int) -> None:
    cost = random_cost(students, teachers)
    plan = transport_plan(cost)
    # Shares of at most 1 in float64, through a program solved to 1e-9.
    torch.testing.assert_close(plan, assigned(cost, [teachers] * students, [students] * teachers), atol=1e-8, rtol=0)


def test_the_exact_plan_of_equal_depths_is_the_best_permutation() -> None:
    cost = random_cost(5, 5)
    best = min(
        permutations(range(5)), key=lambda order: sum(cost[own, other].item() for own, other in enumerate(order))
    )
    assert optimal_transport(cost=cost).weights.argmax(1).tolist() == list(best)
    assert optimal_transport(1 - cost).pairs() == optimal_transport(cost=cost).pairs()


def test_the_exact_plan_with_given_weights() -> None:
    cost = random_cost(3, 4)
    students, teachers = [1, 0, 5], [2, 1, 3, 0]
    plan = transport_plan(cost, student_weights=students, teacher_weights=teachers)
    torch.testing.assert_close(plan, assigned(cost, students, teachers), atol=1e-8, rtol=0)
    layer_map = optimal_transport(cost=cost, student_weights=students, teacher_weights=teachers)
    assert layer_map.weights.sum(1).tolist() == pytest.approx([1, 0, 1], abs=1e-12)
    assert layer_map.weights[:, 3].tolist() == [0, 0, 0]


def test_the_exact_plan_costs_as_much_as_a_linear_programme_says() -> None:
    cost = random_cost(6, 9)
    shares, equations = [], []
    for own in range(6):
        equations.append([1.0 if at // 9 == own else 0.0 for at in range(54)])
        shares.append(1 / 6)
    for other in range(9):
        equations.append([1.0 if at % 9 == other else 0.0 for at in range(54)])
        shares.append(1 / 9)
    least = linprog(cost.flatten().numpy(), A_eq=equations, b_eq=shares, method="highs-ipm").fun
    assert (transport_plan(cost) * cost).sum().item() == pytest.approx(least, abs=1e-7)


@pytest.mark.parametrize("entropy", [1.0, 0.05, 0.01])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.0, 1.0]])
def test_the_entropic_plan_has_its_marginals_and_its_form(entropy: float, weights: list[float] | None) -> None:
    cost = random_cost(4, 9)
    plan = transport_plan(cost, entropy=entropy, student_weights=weights)
    rows = torch.tensor(weights or [1.0] * 4, dtype=torch.float64)
    # Steps end when the columns are off by 1e-9 in sum.
    torch.testing.assert_close(plan.sum(1), rows / rows.sum(), atol=1e-9, rtol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((9,), 1 / 9, dtype=torch.float64), atol=1e-9, rtol=0)
    kept = rows > 0
    # log F = (f_i + g_j - C_ij) / ε, so log F + C / ε has no interaction of rows and columns: no differences of
    # differences. They are sums of four numbers as large as C / ε, which is below 300: 1e-11 allows 50 roundings.
    epsilon = entropy * quantile_half(cost[kept])
    interaction = (plan[kept].log() + cost[kept] / epsilon).diff(dim=0).diff(dim=1)
    torch.testing.assert_close(interaction, torch.zeros_like(interaction), atol=1e-11, rtol=0)


def quantile_half(values: Tensor) -> float:
    return values.abs().flatten().quantile(0.5).item()


def test_the_entropic_plan_goes_to_the_exact_one_and_to_an_even_one() -> None:
    cost = random_cost(4, 9)
    least = (transport_plan(cost) * cost).sum().item()
    used = []
    for entropy in (1.0, 0.1, 0.02, 0.005):
        plan = transport_plan(cost, entropy=entropy)
        excess = (plan * cost).sum().item() - least
        # F minimizes Σ F C - ε H(F), and 0 <= H(F) <= log(4 · 9): the excess is at most ε log 36.
        assert -1e-8 <= excess <= entropy * quantile_half(cost) * math.log(36)
        rows = plan / plan.sum(1, keepdim=True)
        used.append(torch.special.entr(rows).sum(1).exp().mean().item())
    # Teacher layers in use by a student layer: nearly all 9 at ε = 1, about 9/4 + 1 of them in the limit.
    assert used == sorted(used, reverse=True) and used[0] > 8 and used[-1] < 4
    even = transport_plan(cost, entropy=1e7)
    # exp(-C / ε) departs from 1 by max C / (1e7 · median) < 1e-6.
    torch.testing.assert_close(even, torch.full_like(cost, 1 / 36), atol=1e-6 / 36, rtol=0)


def test_an_order_term_keeps_depths_together() -> None:
    cost = 0.01 * random_cost(5, 5)
    assert optimal_transport(cost=cost).weights.diagonal().sum() < 5
    assert optimal_transport(cost=cost, order=1.0).weights.diagonal().tolist() == [1.0] * 5
    # The term is of the ends of layers: λ ((i + 1)/S - (j + 1)/T)².
    own, other = torch.arange(1, 4).double()[:, None] / 3, torch.arange(1, 8).double() / 7
    cost = random_cost(3, 7)
    expected = transport_plan(cost + 0.7 * (own - other) ** 2, entropy=0.1)
    torch.testing.assert_close(transport_plan(cost, order=0.7, entropy=0.1), expected, atol=1e-12, rtol=0)


def test_groups_of_layers_that_nearly_split_off_have_an_entropic_plan() -> None:
    # Two groups whose shares are equal, and which ε keeps apart: exp(-1 / 0.01) of coupling. Sinkhorn iterations
    # alone would reduce the error of the shares as 1 / k.
    cost = torch.block_diag(random_cost(2, 4), random_cost(2, 4, seed=1))
    cost = cost + (cost == 0) * 2.0
    plan = transport_plan(cost, entropy=0.01)
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 1 / 8, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_deep_pair_of_models_has_a_plan_at_any_usual_entropy() -> None:
    cost = random_cost(40, 80)
    least = (transport_plan(cost) * cost).sum().item()
    for entropy in (0.05, 1e-3):
        excess = (transport_plan(cost, entropy=entropy) * cost).sum().item() - least
        assert -1e-8 <= excess <= entropy * quantile_half(cost) * math.log(40 * 80)


def test_costs_that_are_all_alike_have_a_plan() -> None:
    for cost in (torch.zeros(2, 4), torch.full((2, 4), -0.25)):
        torch.testing.assert_close(transport_plan(cost, entropy=0.05), torch.full((2, 4), 1 / 8).double())
        torch.testing.assert_close(transport_plan(cost).sum(1), torch.full((2,), 1 / 2).double())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimal_transport(), "a similarity or a cost"),
        (lambda: optimal_transport(torch.zeros(2, 2), cost=torch.zeros(2, 2)), "and not both"),
        (lambda: optimal_transport(torch.tensor([[math.nan, 0.0]])), "nan of student layer 0 and teacher layer 0"),
        (lambda: optimal_transport(cost=torch.zeros(2)), "a matrix of layers"),
        (lambda: transport_plan(torch.zeros(2, 2), entropy=-0.1), r"entropy[\s\S]*-0.1[\s\S]*>= 0"),
        (lambda: transport_plan(torch.zeros(2, 2), order=math.nan), "order of optimal_transport"),
        (lambda: transport_plan(torch.zeros(2, 2), student_weights=[1.0]), r"student_weights[\s\S]*2 finite numbers"),
        (lambda: transport_plan(torch.zeros(2, 3), teacher_weights=[1.0, -1.0, 1.0]), "teacher_weights"),
        (lambda: transport_plan(torch.zeros(2, 2), student_weights=[0.0, 0.0]), "not all 0"),
        (lambda: transport_plan(torch.zeros(2, 2), student_weights=[math.inf, 1.0]), "student_weights"),
        (lambda: transport_plan(random_cost(3, 4), entropy=1e-12), r"did not converge[\s\S]*1e-12[\s\S]*entropy: 0"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
