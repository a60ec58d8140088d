"""The dense specification of `mixing_distance`: whole matrices, the formula of the distance, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.mixing import Mixing, SoftmaxMixing
from xarch_kd.ops.mixing_inputs import MixingDistanceInputs
from xarch_kd.ops.row_distances import LogarithmFormula


def row_distances(inputs: MixingDistanceInputs) -> Tensor:
    """Return the distance of each row [batch, time, student heads], 0 where a row does not count."""
    # Widened once: in a narrow dtype each use of a factor would round its part of the gradient.
    student_mixing = inputs.student.map_factors(lambda factor: factor.to(inputs.dtype))
    with torch.no_grad():
        teacher = inputs.mixed(inputs.teacher.dense(limit=None).to(inputs.dtype))
    formula = inputs.formula
    if isinstance(formula, LogarithmFormula):
        rows = -(teacher * _log_matrix(student_mixing, teacher > 0, inputs)).sum(-1)
        if formula.with_entropy:
            rows = rows + torch.xlogy(teacher, teacher).sum(-1)
    else:
        rows = formula.dense(student_mixing.dense(limit=None), teacher, inputs.epsilon)
    return torch.where(inputs.valid_mask[:, :, None], rows.transpose(1, 2), 0)


def _log_matrix(mixing: Mixing, attended: Tensor, inputs: MixingDistanceInputs) -> Tensor:
    """Return log M where the teacher attends, 0 elsewhere; from logits, so that it is finite where M underflows."""
    assert isinstance(mixing, SoftmaxMixing)
    everything = slice(0, mixing.time)
    logits = mixing.logits(everything, everything)
    normalizer = mixing.log_normalizer(everything)[..., None]
    return torch.where(attended & inputs.valid_mask[:, None, :, None], logits - normalizer, 0)
