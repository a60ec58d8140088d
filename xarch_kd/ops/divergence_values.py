"""Dense specification of each divergence: values of rows from log-probabilities, differentiated by autograd.

Every function takes log-probabilities [tokens, entries] of the student, log q, and of the teacher, log p, and the
parameters of its divergence, and returns D [tokens], as `ops.divergences.Divergence` defines it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mixture(log_first: Tensor, log_second: Tensor, share: float) -> Tensor:
    """Return log(share * first + (1 - share) * second) of two log-probabilities, 0 < share < 1."""
    return torch.logaddexp(log_first + math.log(share), log_second + math.log1p(-share))


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return KL(p ‖ q)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return KL(q ‖ p)."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(log_q: Tensor, log_p: Tensor, beta: float, normalised: bool) -> Tensor:
    """Return β KL(p ‖ m) + (1-β) KL(q ‖ m), over β(1-β) if `normalised`."""
    middle = mixture(log_p, log_q, beta)
    from_teacher = (log_p.exp() * (log_p - middle)).sum(-1)
    value = beta * from_teacher + (1 - beta) * (log_q.exp() * (log_q - middle)).sum(-1)
    return value / (beta * (1 - beta)) if normalised else value


def skew_forward_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Return KL(p ‖ a p + (1-a) q)."""
    return (log_p.exp() * (log_p - mixture(log_p, log_q, alpha))).sum(-1)


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Return KL(q ‖ a q + (1-a) p)."""
    return (log_q.exp() * (log_q - mixture(log_q, log_p, alpha))).sum(-1)


def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return ½ Σ |p - q|."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def alpha_divergence(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Return (Σ p^a q^(1-a) - 1) / (a (a-1))."""
    return _overlap_excess(log_q, log_p, alpha) / (alpha * (alpha - 1))


def renyi(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Return log Σ p^a q^(1-a) / (a-1)."""
    return torch.log1p(_overlap_excess(log_q, log_p, alpha)) / (alpha - 1)


def _overlap_excess(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Return Σ p^a q^(1-a) - 1, written so that near p = q no two numbers close to 1 are subtracted."""
    overlap = torch.exp(alpha * log_p + (1 - alpha) * log_q)
    return (overlap - alpha * log_p.exp() - (1 - alpha) * log_q.exp()).sum(-1)
