"""The dense specification of `linear_divergence`: logits, log-probabilities, formula, autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xarch_kd.ops.divergence_inputs import DivergenceInputs, pick
from xarch_kd.ops.heads import HeadInputs
from xarch_kd.ops.teacher import Buckets, TeacherLogits


def logits(model: HeadInputs, inputs: DivergenceInputs) -> Tensor:
    """Return the logits [tokens, vocabulary] of the tokens that count, in the dtype of the inputs.

    Hidden states, head and their product are rounded to `logits_dtype`, and so is the gradient on its way back.
    """
    head = model.head
    vocabulary, dtype, rounded = inputs.vocabulary, inputs.dtype, inputs.logits_dtype
    hidden, weight = pick(model.hidden, inputs.valid_indices), head.weight[:vocabulary]
    values = (hidden.to(rounded).to(dtype) @ weight.to(rounded).to(dtype).T).to(rounded).to(dtype)
    if head.bias is not None:
        values = values + head.bias[:vocabulary].to(dtype)
    values = values * head.scale
    return values if head.softcap is None else head.softcap * torch.tanh(values / head.softcap)


def compared(inputs: DivergenceInputs, student: Tensor) -> tuple[Tensor, Tensor]:
    """Return log q and log p of each valid token over what is compared: the vocabulary, or k + 1 buckets.

    `student` are the student's logits [tokens, vocabulary].
    """
    log_q = torch.log_softmax(student / inputs.temperature, -1)
    teacher = inputs.teacher
    if isinstance(teacher, Buckets):
        rest = torch.logsumexp(log_q.scatter(-1, teacher.indices, -math.inf), -1, keepdim=True)
        log_p = teacher.log_probabilities.to(inputs.dtype)
        return torch.cat([log_q.gather(-1, teacher.indices), rest], -1), torch.log_softmax(log_p, -1)
    with torch.no_grad():
        if isinstance(teacher, TeacherLogits):
            values = pick(teacher.values, inputs.valid_indices)[:, : inputs.vocabulary].to(inputs.dtype)
        else:
            values = logits(teacher, inputs)
        return log_q, torch.log_softmax(values / inputs.temperature, -1)


def token_values(inputs: DivergenceInputs) -> tuple[Tensor, Tensor | None]:
    """Return the divergence and, with labels, the cross-entropy (nats, at temperature 1) of each valid token."""
    student = logits(inputs.student, inputs)
    divergence = inputs.divergence.values(*compared(inputs, student))
    if inputs.labels is None:
        return divergence, None
    return divergence, -torch.log_softmax(student, -1).gather(-1, inputs.labels[:, None]).squeeze(-1)
