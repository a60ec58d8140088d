"""The dense specification of `projected_distance`: project, subtract, one formula a distance, autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xarch_kd.ops.distance_problem import DistanceProblem
from xarch_kd.ops.divergence_problem import pick


def token_values(problem: DistanceProblem) -> Tensor:
    """Return the distance of each counted token; for `relative_mse` its part of the numerator."""
    teacher = pick(problem.teacher, problem.kept).to(problem.dtype)
    projected = pick(problem.student, problem.kept).to(problem.dtype)
    if problem.weight is not None:
        projected = projected @ problem.weight.to(problem.dtype).T
    if problem.bias is not None:
        projected = projected + problem.bias.to(problem.dtype)
    if problem.distance == "huber":
        return functional.huber_loss(projected, teacher, reduction="none", delta=problem.delta).mean(-1)
    if problem.distance == "l2":
        # A norm has the subgradient 0 at 0, where a root of a sum has none.
        return torch.linalg.vector_norm(projected - teacher, dim=-1) / teacher.shape[-1] ** 0.5
    squared = (projected - teacher).square()
    if problem.distance == "mse":
        return squared.mean(-1)
    if problem.distance in ("squared_error", "relative_mse"):
        return squared.sum(-1)
    norm = teacher.square().sum(-1)
    if problem.distance == "normalised_mse":
        return squared.sum(-1) / (norm + problem.epsilon)
    lengths = (projected.square().sum(-1) + problem.epsilon).sqrt() * (norm + problem.epsilon).sqrt()
    return 1 - (projected * teacher).sum(-1) / lengths
