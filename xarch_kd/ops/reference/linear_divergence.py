"""The dense specification of `linear_divergence`: logits, log-probabilities, one formula a divergence, autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xarch_kd.ops.divergence_inputs import DivergenceInputs, Side, pick
from xarch_kd.ops.divergences import Divergence
from xarch_kd.ops.teacher import Buckets, Logits


def logits(side: Side, inputs: DivergenceInputs) -> Tensor:
    """Return the logits [tokens, vocabulary] of the tokens that count, in the problem's dtype.

    Hidden states, head and their product are rounded to `logits_dtype`, and so is the gradient on its way back.
    """
    vocabulary, dtype, rounded = inputs.vocabulary, inputs.dtype, inputs.logits_dtype
    hidden, weight = pick(side.hidden, inputs.kept), side.weight[:vocabulary]
    values = (hidden.to(rounded).to(dtype) @ weight.to(rounded).to(dtype).T).to(rounded).to(dtype)
    if side.bias is not None:
        values = values + side.bias[:vocabulary].to(dtype)
    values = values * side.scale
    return values if side.softcap is None else side.softcap * torch.tanh(values / side.softcap)


def mixture(log_first: Tensor, log_second: Tensor, share: float) -> Tensor:
    """Return log(share * first + (1 - share) * second) of two log-probabilities, 0 < share < 1."""
    return torch.logaddexp(log_first + math.log(share), log_second + math.log1p(-share))


def divergence_rows(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return D(p, q) of each row, from log-probabilities [tokens, vocabulary], as `Divergence` defines it."""
    p, q, share = log_p.exp(), log_q.exp(), divergence.parameter or 0.0
    if divergence.kind == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if divergence.kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if divergence.kind == "jsd":
        middle = mixture(log_p, log_q, share)
        value = share * (p * (log_p - middle)).sum(-1) + (1 - share) * (q * (log_q - middle)).sum(-1)
        return value / (share * (1 - share)) if divergence.normalised else value
    if divergence.kind == "skew_forward_kl":
        return (p * (log_p - mixture(log_p, log_q, share))).sum(-1)
    if divergence.kind == "skew_reverse_kl":
        return (q * (log_q - mixture(log_q, log_p, share))).sum(-1)
    if divergence.kind == "total_variation":
        return 0.5 * (p - q).abs().sum(-1)
    overlap = torch.exp(share * log_p + (1 - share) * log_q)
    # Sum(overlap) - 1, written so that near p = q no two numbers close to 1 are subtracted.
    excess = (overlap - share * p - (1 - share) * q).sum(-1)
    if divergence.kind == "alpha":
        return excess / (share * (share - 1))
    return torch.log1p(excess) / (share - 1)


def compared(inputs: DivergenceInputs, student: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p and log q of each counted token over what is compared: the vocabulary, or k + 1 buckets.

    `student` are the student's logits [tokens, vocabulary].
    """
    log_q = torch.log_softmax(student / inputs.temperature, -1)
    teacher = inputs.teacher
    if isinstance(teacher, Buckets):
        rest = torch.logsumexp(log_q.scatter(-1, teacher.indices, -math.inf), -1, keepdim=True)
        log_p = teacher.log_probabilities.to(inputs.dtype)
        return torch.log_softmax(log_p, -1), torch.cat([log_q.gather(-1, teacher.indices), rest], -1)
    with torch.no_grad():
        if isinstance(teacher, Logits):
            values = pick(teacher.values, inputs.kept)[:, : inputs.vocabulary].to(inputs.dtype)
        else:
            values = logits(teacher, inputs)
        return torch.log_softmax(values / inputs.temperature, -1), log_q


def token_values(inputs: DivergenceInputs) -> tuple[Tensor, Tensor | None]:
    """Return the divergence and, with labels, the cross-entropy (nats, at temperature 1) of each counted token."""
    student = logits(inputs.student, inputs)
    divergence = divergence_rows(inputs.divergence, *compared(inputs, student))
    if inputs.labels is None:
        return divergence, None
    return divergence, -torch.log_softmax(student, -1).gather(-1, inputs.labels[:, None]).squeeze(-1)
