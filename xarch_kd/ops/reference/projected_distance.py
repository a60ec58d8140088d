"""The dense specification of `projected_distance`: project, the formula of the distance, autograd."""

from __future__ import annotations

from torch import Tensor

from xarch_kd.ops.divergence_inputs import pick
from xarch_kd.ops.projected_inputs import ProjectedDistanceInputs


def token_values(inputs: ProjectedDistanceInputs) -> Tensor:
    """Return the distance of each valid token; for `relative_mse` its part of the numerator."""
    teacher = pick(inputs.teacher, inputs.valid_indices).to(inputs.dtype)
    projected = pick(inputs.student, inputs.valid_indices).to(inputs.dtype)
    if inputs.weight is not None:
        projected = projected @ inputs.weight.to(inputs.dtype).T
    if inputs.bias is not None:
        projected = projected + inputs.bias.to(inputs.dtype)
    return inputs.formula.token_values(projected, teacher, **inputs.arguments)
