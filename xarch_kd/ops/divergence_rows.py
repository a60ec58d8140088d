"""Closed form of each divergence: value and gradient of rows, from logits over the temperature.

With x = log p - log q and the divergence Σ F, the gradient with respect to the student's logits is q ⊙ (f' - Σ q f'),
f' = ∂F/∂q. Where q is nearly one-hot these two terms cancel, so f' is first centered, which changes nothing in exact
arithmetic. `forward_kl`, `alpha` and `renyi` are written with R = q f' instead, because f' itself overflows where q
vanishes.

A group of rows is read from cache, where the number of passes and of transcendental functions is what costs: there is
one softmax per model and, for the divergences from a mixture, one expm1 and one log1p.

Every function takes the student's distribution q, the teacher's p, which is overwritten, `gradient` (whether one is
computed) and the parameters of its divergence. It returns D [rows] and its gradient [rows, entries] or None.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# exp of it is far from overflow in float32. Where p / q is larger, p has all of the mixture and q no weight in any sum.
LARGE_LOG_RATIO = 60.0
# In place of -inf where p is 0: times p it is 0.
SMALLEST_LOG_RATIO = -1e30
# Logarithms of ratios and of sums below this are small: expm1 and log1p keep their digits.
NEAR = 0.5
# Sums of p log(p / q) below this are dominated by the rounding of their summands, about 1e-7 in float32.
FEW_DIGITS = 1e-4

Rows = tuple[Tensor, Tensor | None]


class Distribution(NamedTuple):
    """Softmax of each row: log of it is logits - top + log(likeliest), columns `top` and `likeliest` [rows, 1].

    `top` is the largest logit and `likeliest` its probability.
    """

    logits: Tensor
    probabilities: Tensor
    top: Tensor
    likeliest: Tensor


def distribution(logits: Tensor) -> Distribution:
    """Return the distribution of each row of logits [rows, vocabulary], which is valid_indices, not copied."""
    probabilities = torch.softmax(logits, -1)
    top, likeliest = logits.amax(-1, keepdim=True), probabilities.amax(-1, keepdim=True)
    return Distribution(logits, probabilities, top, likeliest)


def forward_kl(q: Distribution, p: Distribution, gradient: bool) -> Rows:
    """Return KL(p ‖ q); its gradient is q - p."""
    log_ratio = _log_ratio(q, p).clamp_(min=SMALLEST_LOG_RATIO)
    value = _refined(_dot(p.probabilities, log_ratio), p.probabilities, q.probabilities, log_ratio)
    return value, torch.sub(q.probabilities, p.probabilities, out=log_ratio) if gradient else None


def reverse_kl(q: Distribution, p: Distribution, gradient: bool) -> Rows:
    """Return KL(q ‖ p); f' = -x."""
    log_ratio = _log_ratio(q, p).neg_()
    value = _refined(_dot(q.probabilities, log_ratio), q.probabilities, p.probabilities, log_ratio)
    return value, _centered(q, log_ratio) if gradient else None


def jsd(q: Distribution, p: Distribution, gradient: bool, beta: float, normalised: bool) -> Rows:
    """Return β KL(p ‖ m) + (1-β) KL(q ‖ m), over β(1-β) if `normalised`; f' = (1-β) log(q / m)."""
    log_ratio, excess = _excess(q, p, beta)
    scale = 1 / (beta * (1 - beta)) if normalised else 1.0
    from_teacher = _dot(p.probabilities, log_ratio.sub_(excess))
    value = (beta * from_teacher - (1 - beta) * _dot(q.probabilities, excess)) * scale
    return value, _centered(q, excess.mul_((beta - 1) * scale)) if gradient else None


def skew_forward_kl(q: Distribution, p: Distribution, gradient: bool, alpha: float) -> Rows:
    """Return KL(p ‖ m), m = a p + (1-a) q; f' = (a-1) p / m."""
    log_ratio, excess = _excess(q, p, alpha)
    teacher_over_mixture = log_ratio.sub_(excess)
    value = _dot(p.probabilities, teacher_over_mixture)
    value = _refined(value, p.probabilities, torch.lerp(q.probabilities, p.probabilities, alpha), teacher_over_mixture)
    return value, _centered(q, teacher_over_mixture.exp_().mul_(alpha - 1)) if gradient else None


def skew_reverse_kl(q: Distribution, p: Distribution, gradient: bool, alpha: float) -> Rows:
    """Return KL(q ‖ m), m = a q + (1-a) p; f' = log(q / m) - a q / m up to a constant."""
    log_ratio, excess = _excess(q, p, 1 - alpha)
    student_over_mixture = excess.neg_()
    value = _dot(q.probabilities, student_over_mixture)
    value = _refined(value, q.probabilities, torch.lerp(p.probabilities, q.probabilities, alpha), student_over_mixture)
    if not gradient:
        return value, None
    slope = torch.exp(student_over_mixture, out=log_ratio).mul_(-alpha).add_(student_over_mixture)
    return value, _centered(q, slope)


def total_variation(q: Distribution, p: Distribution, gradient: bool) -> Rows:
    """Return ½ Σ |p - q|; f' = -½ sign(p - q)."""
    difference = torch.sub(p.probabilities, q.probabilities, out=p.probabilities)
    value = 0.5 * difference.abs().sum(-1)
    return value, _centered(q, difference.sign_().mul_(-0.5)) if gradient else None


def alpha_divergence(q: Distribution, p: Distribution, gradient: bool, alpha: float) -> Rows:
    """Return (Σ p^a q^(1-a) - 1) / (a (a-1)); R = -p^a q^(1-a) / a."""
    log_ratio = _log_ratio(q, p)
    overlap = _log_overlap(q, log_ratio, alpha).exp_()
    value = _overlap_excess(q, p, log_ratio, overlap, alpha) / (alpha * (alpha - 1))
    if not gradient:
        return value, None
    total = overlap.sum(-1, keepdim=True)
    return value, torch.mul(q.probabilities, total, out=log_ratio).sub_(overlap).mul_(1 / alpha)


def renyi(q: Distribution, p: Distribution, gradient: bool, alpha: float) -> Rows:
    """Return log Σ p^a q^(1-a) / (a-1); R = -p^a q^(1-a) / Σ p^a q^(1-a)."""
    log_ratio = _log_ratio(q, p)
    log_overlap = _log_overlap(q, log_ratio, alpha)
    peak = log_overlap.amax(-1, keepdim=True)
    shares = log_overlap.sub_(peak).exp_()
    total = shares.sum(-1, keepdim=True)
    logarithm = (peak + total.log()).squeeze(-1)
    excess = _overlap_excess(q, p, log_ratio, shares * peak.clamp(max=LARGE_LOG_RATIO).exp(), alpha)
    value = torch.where(logarithm.abs() < NEAR, excess.log1p(), logarithm) / (alpha - 1)
    return value, torch.sub(q.probabilities, shares.div_(total), out=log_ratio) if gradient else None


def entropy_aware(q: Distribution, p: Distribution, gradient: bool, threshold: float) -> Rows:
    """Return KL(p ‖ q) where the entropy of p is above `threshold`, KL(q ‖ p) elsewhere."""
    information = p.top - torch.log(p.likeliest) - p.logits.clamp(min=SMALLEST_LOG_RATIO)
    is_open = _dot(p.probabilities, information) > threshold
    ratio = _log_ratio(q, p)
    bounded = ratio.clamp(min=SMALLEST_LOG_RATIO)
    forward = _refined(_dot(p.probabilities, bounded), p.probabilities, q.probabilities, bounded)
    reverse = _refined(-_dot(q.probabilities, ratio), q.probabilities, p.probabilities, -ratio)
    value = torch.where(is_open, forward, reverse)
    if not gradient:
        return value, None
    return value, torch.where(is_open.unsqueeze(-1), q.probabilities - p.probabilities, _centered(q, ratio.neg_()))


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return torch.linalg.vecdot(one, other)


def _refined(value: Tensor, first: Tensor, second: Tensor, log_ratio: Tensor) -> Tensor:
    """Return Σ first log(first / second) of each row, small ones as Σ [first log(first / second) - first + second].

    These summands are never negative, so that no digit is lost. On a CPU only the rows that need it are computed again.
    """
    is_small = value < FEW_DIGITS
    rows = is_small.nonzero().squeeze(1) if value.device.type == "cpu" else slice(None)
    if isinstance(rows, Tensor) and len(rows) == 0:
        return value
    one, other, ratio = first[rows], second[rows], log_ratio[rows]
    is_near = ratio.abs() < NEAR
    near = torch.where(is_near, ratio, 0.0)
    exact = torch.where(is_near, one * (near + torch.expm1(-near)), one * ratio - one + other).sum(-1)
    return value.index_copy(0, rows, exact) if isinstance(rows, Tensor) else torch.where(is_small, exact, value)


def _log_ratio(q: Distribution, p: Distribution) -> Tensor:
    """Return log p - log q, written over the logits of p.

    The logits are subtracted first and their offsets next, so that near p = q no digit is lost to the normalizers.
    """
    return p.logits.sub_(q.logits).sub_(p.top - q.top).add_(torch.log(p.likeliest / q.likeliest))


def _excess(q: Distribution, p: Distribution, teacher_share: float) -> tuple[Tensor, Tensor]:
    """Return x = log p - log q, and log(m / q) = log1p(s (eˣ - 1)) of the mixture m = s p + (1-s) q."""
    log_ratio = _log_ratio(q, p).clamp_(SMALLEST_LOG_RATIO, LARGE_LOG_RATIO)
    return log_ratio, torch.expm1(log_ratio).mul_(teacher_share).log1p_()


def _log_overlap(q: Distribution, log_ratio: Tensor, alpha: float) -> Tensor:
    """Return the logarithm of the overlap p^a q^(1-a) = q e^(a x), whose eˣ alone overflows."""
    return torch.add(q.logits, log_ratio, alpha=alpha).sub_(q.top).add_(torch.log(q.likeliest))


def _overlap_excess(q: Distribution, p: Distribution, log_ratio: Tensor, overlap: Tensor, alpha: float) -> Tensor:
    """Return Σ overlap - 1 [rows], written so that near p = q no two numbers close to 1 are subtracted.

    Small ones are computed again from expm1 of x, and are 0 for p = q; on a CPU only in the rows that need it.
    """
    summand = torch.sub(overlap, p.probabilities, alpha=alpha).sub_(q.probabilities, alpha=1 - alpha)
    value = summand.sum(-1)
    is_small = value.abs() < FEW_DIGITS
    rows = is_small.nonzero().squeeze(1) if value.device.type == "cpu" else slice(None)
    if isinstance(rows, Tensor) and len(rows) == 0:
        return value
    ratio = log_ratio[rows]
    is_near = ratio.abs() < NEAR
    near = torch.where(is_near, ratio, 0.0)
    close = torch.expm1(near * alpha).sub_(torch.expm1(near), alpha=alpha).mul_(q.probabilities[rows])
    exact = torch.where(is_near, close, summand[rows]).sum(-1)
    return value.index_copy(0, rows, exact) if isinstance(rows, Tensor) else torch.where(is_small, exact, value)


def _centered(q: Distribution, slope: Tensor) -> Tensor:
    """Return q ⊙ (f' - Σ q f') from f', which is overwritten.

    The mean is subtracted twice: the first leaves values near 0 where q has its mass, the second is the mean of those
    and so has their digits.
    """
    for _ in range(2):
        slope.sub_(_dot(q.probabilities, slope).unsqueeze(-1))
    return slope.mul_(q.probabilities)
