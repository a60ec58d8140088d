"""Dense specification of each divergence: values of rows from log-probabilities, differentiated by autograd.

Every function takes log-probabilities [tokens, entries] of the student, log q, and of the teacher, log p, and the
parameters of its divergence, and returns D [tokens], as `ops.divergences.Divergence` defines it.

Where log p is -inf the summand is its limit, and infinite in divergences that have none. Sums over p and q alone, which
are 1, are moved into the summands, so that each is 0 where p = q, and none is the difference of two numbers near 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Logarithms of ratios and of sums below this are small: expm1 and log1p keep their digits.
NEAR = 0.5


def mixture(log_first: Tensor, log_second: Tensor, share: float) -> Tensor:
    """Return log(share * first + (1 - share) * second) of two log-probabilities, 0 < share < 1."""
    return torch.logaddexp(log_first + math.log(share), log_second + math.log1p(-share))


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return KL(p ‖ q)."""
    return _kl(log_p, log_q)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return KL(q ‖ p)."""
    return _kl(log_q, log_p)


def jsd(log_q: Tensor, log_p: Tensor, beta: float, normalised: bool) -> Tensor:
    """Return β KL(p ‖ m) + (1-β) KL(q ‖ m), over β(1-β) if `normalised`."""
    middle = mixture(log_p, log_q, beta)
    value = beta * _kl(log_p, middle) + (1 - beta) * _kl(log_q, middle)
    return value / (beta * (1 - beta)) if normalised else value


def skew_forward_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Return KL(p ‖ a p + (1-a) q)."""
    return _kl(log_p, mixture(log_p, log_q, alpha))


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Return KL(q ‖ a q + (1-a) p)."""
    return _kl(log_q, mixture(log_q, log_p, alpha))


def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return ½ Σ |p - q|."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def alpha_divergence(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Return (Σ p^a q^(1-a) - 1) / (a (a-1))."""
    return _overlap_excess(log_q, log_p, alpha) / (alpha * (alpha - 1))


def renyi(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Return log Σ p^a q^(1-a) / (a-1), near 0 from that sum less 1 and elsewhere from its logarithm."""
    logarithm = torch.logsumexp(alpha * log_p + (1 - alpha) * log_q, -1)
    is_near = logarithm.detach().abs() < NEAR
    # Rows that are far take part with p = q, as their own sum may be infinite.
    excess = _overlap_excess(log_q, torch.where(is_near.unsqueeze(-1), log_p, log_q.detach()), alpha)
    return torch.where(is_near, torch.log1p(excess), logarithm) / (alpha - 1)


def alpha_beta(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> Tensor:
    """Return Σ [a p^s / s + b q^s / s - p^a q^b] / (a b), s = a + b."""
    total = alpha + beta
    log_ratio = log_p - log_q
    is_near = log_ratio.detach().abs() < NEAR
    near = torch.where(is_near, log_ratio, torch.zeros_like(log_ratio))
    close = (total * log_q).exp() * (alpha / total * torch.expm1(total * near) - torch.expm1(alpha * near))
    far = (
        alpha / total * (total * log_p).exp()
        + beta / total * (total * log_q).exp()
        - (alpha * log_p + beta * log_q).exp()
    )
    return torch.where(is_near, close, far).sum(-1) / (alpha * beta)


def entropy_aware(log_q: Tensor, log_p: Tensor, threshold: float) -> Tensor:
    """Return KL(p ‖ q) where the entropy of p is above `threshold`, KL(q ‖ p) elsewhere."""
    is_open = -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(-1) > threshold
    # Rows of the other branch take part with p = q, as theirs may be infinite.
    sure = torch.where(is_open.unsqueeze(-1), log_q.detach(), log_p)
    return torch.where(is_open, forward_kl(log_q, log_p), reverse_kl(log_q, sure))


def adaptive_kl(log_q: Tensor, log_p: Tensor, head_mass: float) -> Tensor:
    """Return w KL(p ‖ q) + (1-w) KL(q ‖ p), w the share of Σ |p - q| in the head of p, without a gradient."""
    with torch.no_grad():
        p = log_p.exp()
        gap = (p - log_q.exp()).abs()
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        # The likeliest entry, and those until which no more than this mass is summed.
        is_head = (ordered.cumsum(-1) <= head_mass).index_fill(
            -1, torch.zeros(1, dtype=torch.long, device=p.device), True
        )
        inside, whole = (gap.gather(-1, order) * is_head).sum(-1), gap.sum(-1)
        weight = torch.where(whole > 0, inside / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0.5)
    return weight * forward_kl(log_q, log_p) + (1 - weight) * reverse_kl(log_q, log_p)


def _kl(log_first: Tensor, log_second: Tensor) -> Tensor:
    """Return Σ [first log(first / second) - first + second], whose summands are never negative."""
    log_ratio = log_first - log_second
    is_near = log_ratio.detach().abs() < NEAR
    near = torch.where(is_near, log_ratio, torch.zeros_like(log_ratio))
    first = log_first.exp()
    # Where the first is 0 so is its product with the logarithm.
    finite = torch.where(log_first.isneginf(), torch.zeros_like(log_ratio), log_ratio)
    return torch.where(is_near, first * (near + torch.expm1(-near)), first * finite - first + log_second.exp()).sum(-1)


def _overlap_excess(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Return Σ p^a q^(1-a) - 1, with summands that are 0 where p = q."""
    log_ratio = log_p - log_q
    is_near = log_ratio.detach().abs() < NEAR
    near = torch.where(is_near, log_ratio, torch.zeros_like(log_ratio))
    close = log_q.exp() * (torch.expm1(alpha * near) - alpha * torch.expm1(near))
    overlap = torch.exp(alpha * log_p + (1 - alpha) * log_q)
    return torch.where(is_near, close, overlap - alpha * log_p.exp() - (1 - alpha) * log_q.exp()).sum(-1)
