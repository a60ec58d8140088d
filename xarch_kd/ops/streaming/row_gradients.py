"""Divergence and gradient of each row in closed form, from log-probabilities.

With x = log p - log q and the divergence Σ F, the gradient with respect to the student's logits is q ⊙ (f' - Σ q f'),
f' = ∂F/∂q. Where q is nearly one-hot these two terms cancel, so f' is first centred at the student's likeliest entry,
which changes nothing in exact arithmetic. `forward_kl`, `alpha` and `renyi` are written with R = q f' instead, because
f' itself overflows where q vanishes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.ops.divergences import Divergence

# exp of it is far from overflow in float32, and what log1p drops beyond it is below rounding.
LARGE_LOG_RATIO = 60.0

Rows = tuple[Tensor, Tensor | None]


def rows_with_gradient(divergence: Divergence, log_p: Tensor, log_q: Tensor, gradient: bool) -> Rows:
    """Return D [rows] and, if asked, ∂D/∂logits [rows, vocabulary] of the student's logits over the temperature.

    `log_p` may be overwritten; `log_q` is left as it is.
    """
    kind, share = divergence.kind, divergence.parameter or 0.0
    if kind == "forward_kl":
        return _forward_kl(log_p, log_q, gradient)
    if kind in ("alpha", "renyi"):
        return _power(kind, share, log_p, log_q, gradient)
    q = log_q.exp()
    if kind == "reverse_kl":
        log_ratio = log_p.sub_(log_q)
        value = -(q * log_ratio).sum(-1)
        return value, _centred(q, log_ratio.neg_(), log_q) if gradient else None
    if kind == "total_variation":
        difference = log_p.exp_().sub_(q)
        value = 0.5 * difference.abs().sum(-1)
        return value, _centred(q, difference.sign_().mul_(-0.5), log_q) if gradient else None
    return _mixture(divergence, log_p, log_q, q, gradient)


def _forward_kl(log_p: Tensor, log_q: Tensor, gradient: bool) -> Rows:
    p = log_p.exp()
    value = log_p.sub_(log_q).mul_(p).sum(-1)
    return value, log_q.exp().sub_(p) if gradient else None


def _mixture(divergence: Divergence, log_p: Tensor, log_q: Tensor, q: Tensor, gradient: bool) -> Rows:
    kind, share = divergence.kind, divergence.parameter or 0.0
    teacher_share = 1 - share if kind == "skew_reverse_kl" else share
    p = log_p.exp()
    log_ratio = log_p.sub_(log_q)
    to_mixture = _log_student_over_mixture(log_ratio, teacher_share)
    if kind == "jsd":
        scale = 1 / (share * (1 - share)) if divergence.normalised else 1.0
        value = (p.mul_(log_ratio.add_(to_mixture)).sum(-1) * share + (q * to_mixture).sum(-1) * (1 - share)) * scale
        return value, _centred(q, to_mixture.mul_((1 - share) * scale), log_q) if gradient else None
    if kind == "skew_forward_kl":
        teacher_over_mixture = log_ratio.add_(to_mixture)
        value = p.mul_(teacher_over_mixture).sum(-1)
        return value, _centred(q, teacher_over_mixture.exp_().mul_(share - 1), log_q) if gradient else None
    value = (q * to_mixture).sum(-1)
    if not gradient:
        return value, None
    return value, _centred(q, to_mixture - to_mixture.exp().mul_(share), log_q)


def _log_student_over_mixture(log_ratio: Tensor, teacher_share: float) -> Tensor:
    """Return log(q / (s p + (1-s) q)) = -log1p(s (eˣ - 1)), which keeps its digits where p and q are close."""
    bounded = log_ratio.clamp(max=LARGE_LOG_RATIO)
    beyond = log_ratio - bounded
    return bounded.expm1_().mul_(teacher_share).log1p_().add_(beyond).neg_()


def _power(kind: str, share: float, log_p: Tensor, log_q: Tensor, gradient: bool) -> Rows:
    p, q = log_p.exp(), log_q.exp()
    overlap = log_p.mul_(share).add_(log_q, alpha=1 - share).exp_()
    excess = (overlap - p.mul_(share)).sub_(q, alpha=1 - share).sum(-1)
    total = overlap.sum(-1, keepdim=True)
    if kind == "alpha":
        value, scale = excess / (share * (share - 1)), torch.full_like(total, 1 / share)
    else:
        value, scale = torch.log1p(excess) / (share - 1), total.reciprocal()
    return value, q.mul_(total).sub_(overlap).mul_(scale) if gradient else None


def _centred(q: Tensor, slope: Tensor, log_q: Tensor) -> Tensor:
    """Return q ⊙ (f' - Σ q f') from f', which is overwritten, centred at the likeliest entry of q."""
    slope.sub_(slope.gather(-1, log_q.argmax(-1, keepdim=True)))
    mean = (q * slope).sum(-1, keepdim=True)
    return slope.sub_(mean).mul_(q)
