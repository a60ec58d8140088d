"""Divergence of each row and its gradient: in closed form where the formula has one, else by autograd on the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.ops.divergence_rows import Distribution, Rows, distribution
from xarch_kd.ops.divergences import Divergence


def rows_with_gradient(divergence: Divergence, student: Tensor, teacher: Tensor, gradient: bool) -> Rows:
    """Return D [rows] and, if asked, ∂D/∂student [rows, vocabulary], of logits over the temperature.

    `teacher` may be overwritten; `student` is left as it is.
    """
    return compare(divergence, distribution(student), distribution(teacher), gradient)


def compare(divergence: Divergence, q: Distribution, p: Distribution, gradient: bool) -> Rows:
    """Return D(p, q) [rows] and, if asked, its gradient to the student's logits; `p` is overwritten, `q` is not."""
    rows = divergence.formula.rows
    if rows is None:
        return _by_autograd(divergence, q.logits, p.logits, gradient)
    return rows(q, p, gradient, **divergence.arguments)


def _by_autograd(divergence: Divergence, student: Tensor, teacher: Tensor, gradient: bool) -> Rows:
    """Return values and gradient of these rows; the graph holds only them."""
    log_p = torch.log_softmax(teacher, -1)
    if not gradient:
        return divergence.values(torch.log_softmax(student, -1), log_p), None
    with torch.enable_grad():
        logits = student.detach().requires_grad_()
        values = divergence.values(torch.log_softmax(logits, -1), log_p)
    (slope,) = torch.autograd.grad(values, logits, torch.ones_like(values))
    return values.detach(), slope
