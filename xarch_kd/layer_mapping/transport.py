"""Layer maps by optimal transport: rows of the cheapest plan from student to teacher layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy
import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping.layer_map import LayerMap
from xarch_kd.layer_mapping.similarity import checked_matrix

# Relative to marginals that sum to 1: the largest error of an entropic plan's columns, and the smallest entry of an
# exact plan that is not slack of the linear program.
TOLERANCE: Final = 1e-9
SWEEPS: Final = 50
NEWTON_STEPS: Final = 100
HALVINGS: Final = 40


def optimal_transport(
    similarity: Tensor | None = None,
    *,
    cost: Tensor | None = None,
    entropy: float = 0.0,
    order: float = 0.0,
    student_weights: Sequence[float] | None = None,
    teacher_weights: Sequence[float] | None = None,
) -> LayerMap:
    """Return the rows of the cheapest transport plan (BERT-EMD, Li et al. 2020), each divided by its sum.

    The cost is 1 - `similarity`, or `cost`, both [student layers, teacher layers]; options as in `transport_plan`. A
    student layer of weight 0 is not matched; other weights affect the plan only, since rows are normalized.

    Raises UsageError as `transport_plan` does, and unless exactly one of `similarity` and `cost` is given.
    """
    if (similarity is None) == (cost is None):
        raise UsageError("layers: optimal_transport needs a similarity or a cost, and not both")
    if similarity is not None:
        # Checked before 1 - similarity, so that messages show the number that was given.
        cost = 1 - torch.from_numpy(checked_matrix("optimal_transport", similarity))
    assert cost is not None
    plan = transport_plan(
        cost, entropy=entropy, order=order, student_weights=student_weights, teacher_weights=teacher_weights
    )
    totals = plan.sum(1, keepdim=True)
    return LayerMap("optimal_transport", plan / totals.where(totals > 0, 1))


def transport_plan(
    cost: Tensor,
    *,
    entropy: float = 0.0,
    order: float = 0.0,
    student_weights: Sequence[float] | None = None,
    teacher_weights: Sequence[float] | None = None,
) -> Tensor:
    """Return the plan F >= 0 [student layers, teacher layers], float64, of least Σ F · C with the given marginals.

    C = `cost` + `order` · ((i + 1) / S - (j + 1) / T)², which favors equal depths. Rows of F sum to
    `student_weights`, columns to `teacher_weights`; both are divided by their sum, and are uniform by default. With
    `entropy` 0 the plan is the exact solution of the linear program; above 0 it minimizes Σ F · C - ε H(F), with ε =
    `entropy` × median |C|, by Sinkhorn iterations in the log domain (Cuturi 2013). 0.05 is a good first choice: at 1
    every student layer learns from nearly all teacher layers.

    Raises UsageError for a cost that is empty or not finite, weights that do not fit, a negative entropy or order, and
    an entropy so small that the iterations do not converge.

    >>> import torch
    >>> from xarch_kd.layer_mapping import transport_plan
    >>> transport_plan(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    costs = checked_matrix("optimal_transport", cost)
    for name, value in (("entropy", entropy), ("order", order)):
        if not 0 <= value < math.inf:
            raise UsageError(f"layers: {name} of optimal_transport is out of range", found=value, allowed=">= 0")
    students, teachers = costs.shape
    depths = numpy.arange(1, students + 1)[:, None] / students - numpy.arange(1, teachers + 1)[None] / teachers
    costs = costs + order * depths**2
    rows = _shares("student_weights", student_weights, students)
    columns = _shares("teacher_weights", teacher_weights, teachers)
    kept = numpy.ix_(rows > 0, columns > 0)
    plan = numpy.zeros_like(costs)
    sides = costs[kept], rows[rows > 0], columns[columns > 0]
    plan[kept] = _entropic(*sides, entropy) if entropy else _exact(*sides)
    return torch.from_numpy(plan)


def _exact(costs: numpy.ndarray, rows: numpy.ndarray, columns: numpy.ndarray) -> numpy.ndarray:
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron, vstack

    students, teachers = costs.shape
    # F is flattened row by row.
    sums = vstack(
        [
            kron(eye_array(students), numpy.ones((1, teachers))),
            kron(numpy.ones((1, students)), eye_array(teachers)),
        ]
    )
    # The simplex method returns a vertex: at most S + T - 1 entries, not a mixture of plans of equal cost.
    found = linprog(costs.ravel(), A_eq=sums, b_eq=numpy.concatenate([rows, columns]), method="highs-ds")
    assert found.success, found.message
    plan = found.x.reshape(students, teachers)
    return numpy.where(plan > TOLERANCE, plan, 0.0)


def _entropic(costs: numpy.ndarray, rows: numpy.ndarray, columns: numpy.ndarray, entropy: float) -> numpy.ndarray:
    """Return F = exp((f_i + g_j - C_ij) / ε) with the given sums.

    Sinkhorn iterations start at a large ε, which is halved. They converge very slowly if groups of layers nearly
    separate, so Newton steps finish the solution.
    """
    costs = costs / (float(numpy.median(numpy.abs(costs))) or 1.0)
    potentials = numpy.zeros_like(columns)
    for level in range(max(0, math.ceil(-math.log2(entropy))), -1, -1):
        epsilon = entropy * 2**level
        for _ in range(SWEEPS):
            reached = _logsumexp(_log_plan(costs, potentials, rows, epsilon), 0)
            potentials = potentials + epsilon * (numpy.log(columns) - reached)
    plan, error = _newton(costs, potentials, rows, columns, entropy)
    if error > TOLERANCE:
        raise UsageError(
            "layers: the entropic plan of optimal_transport did not converge",
            asked=f"entropy: {entropy}",
            found=f"shares of teacher layers that are off by {error:.2g}",
            fix="a greater entropy, or entropy: 0 for the exact plan",
        )
    return plan


def _newton(
    costs: numpy.ndarray, potentials: numpy.ndarray, rows: numpy.ndarray, columns: numpy.ndarray, epsilon: float
) -> tuple[numpy.ndarray, float]:
    """Return the plan and the total error of its columns after Newton steps with backtracking."""

    def reached(potentials: numpy.ndarray) -> tuple[numpy.ndarray, float]:
        plan = numpy.exp(_log_plan(costs, potentials, rows, epsilon))
        return plan, float(numpy.abs(plan.sum(0) - columns).sum())

    plan, error = reached(potentials)
    for _ in range(NEWTON_STEPS):
        if error <= TOLERANCE:
            break
        # Jacobian of the column sums with respect to g / ε; singular, since adding a constant to g changes nothing.
        slopes = numpy.diag(plan.sum(0)) - plan.T @ (plan / rows[:, None])
        step = epsilon * numpy.linalg.lstsq(slopes, columns - plan.sum(0), rcond=None)[0]
        lengths = (0.5**halving for halving in range(HALVINGS))
        length = next((length for length in lengths if reached(potentials + length * step)[1] < error), None)
        if length is None:
            break
        potentials = potentials + length * step
        plan, error = reached(potentials)
    return plan, error


def _log_plan(costs: numpy.ndarray, potentials: numpy.ndarray, rows: numpy.ndarray, epsilon: float) -> numpy.ndarray:
    """Return log F for g = `potentials` and the f that gives the rows their sums."""
    scores = (potentials[None] - costs) / epsilon
    return scores + (numpy.log(rows) - _logsumexp(scores, 1))[:, None]


def _logsumexp(values: numpy.ndarray, axis: int) -> numpy.ndarray:
    highest = values.max(axis, keepdims=True)
    return numpy.log(numpy.exp(values - highest).sum(axis)) + highest.squeeze(axis)


def _shares(name: str, weights: Sequence[float] | None, count: int) -> numpy.ndarray:
    """Return `weights` divided by their sum, or uniform ones."""
    if weights is None:
        return numpy.full(count, 1 / count)
    found = numpy.asarray(weights, dtype=numpy.float64)
    if found.shape != (count,) or not numpy.isfinite(found).all() or (found < 0).any() or found.sum() == 0:
        raise UsageError(
            f"layers: {name} of optimal_transport do not fit",
            found=list(weights),
            allowed=f"{count} finite numbers >= 0, not all 0",
        )
    return found / found.sum()
