"""The dense specification of `projected_distance`: project, subtract, one formula a distance, autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xarch_kd.ops.divergence_inputs import pick
from xarch_kd.ops.projected_inputs import ProjectedDistanceInputs


def token_values(inputs: ProjectedDistanceInputs) -> Tensor:
    """Return the distance of each counted token; for `relative_mse` its part of the numerator."""
    teacher = pick(inputs.teacher, inputs.kept).to(inputs.dtype)
    projected = pick(inputs.student, inputs.kept).to(inputs.dtype)
    if inputs.weight is not None:
        projected = projected @ inputs.weight.to(inputs.dtype).T
    if inputs.bias is not None:
        projected = projected + inputs.bias.to(inputs.dtype)
    if inputs.distance == "huber":
        return functional.huber_loss(projected, teacher, reduction="none", delta=inputs.delta).mean(-1)
    if inputs.distance == "l2":
        # A norm has the subgradient 0 at 0, where a root of a sum has none.
        return torch.linalg.vector_norm(projected - teacher, dim=-1) / teacher.shape[-1] ** 0.5
    squared = (projected - teacher).square()
    if inputs.distance == "mse":
        return squared.mean(-1)
    if inputs.distance in ("squared_error", "relative_mse"):
        return squared.sum(-1)
    norm = teacher.square().sum(-1)
    if inputs.distance == "normalised_mse":
        return squared.sum(-1) / (norm + inputs.epsilon)
    lengths = (projected.square().sum(-1) + inputs.epsilon).sqrt() * (norm + inputs.epsilon).sqrt()
    return 1 - (projected * teacher).sum(-1) / lengths
