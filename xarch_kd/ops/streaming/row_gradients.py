"""Divergence and gradient of each row in closed form, from logits over the temperature.

With x = log p - log q and the divergence Σ F, the gradient with respect to the student's logits is q ⊙ (f' - Σ q f'),
f' = ∂F/∂q. Where q is nearly one-hot these two terms cancel, so f' is first centred, which changes nothing in exact
arithmetic. `forward_kl`, `alpha` and `renyi` are written with R = q f' instead, because f' itself overflows where q
vanishes.

A group of rows is read from cache, where the number of passes and of transcendental functions is what costs: there is
one softmax a model and, for the divergences from a mixture, one expm1 and one log1p.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xarch_kd.ops.divergences import Divergence

# exp of it is far from overflow in float32. Where p / q is larger, p has all of the mixture and q no weight in any sum.
LARGE_LOG_RATIO = 60.0

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
    """Return the distribution of each row of logits [rows, vocabulary], which is kept, not copied."""
    probabilities = torch.softmax(logits, -1)
    top, likeliest = logits.amax(-1, keepdim=True), probabilities.amax(-1, keepdim=True)
    return Distribution(logits, probabilities, top, likeliest)


def rows_with_gradient(divergence: Divergence, teacher: Tensor, student: Tensor, gradient: bool) -> Rows:
    """Return D [rows] and, if asked, ∂D/∂student [rows, vocabulary], of logits over the temperature.

    `teacher` may be overwritten; `student` is left as it is.
    """
    return compare(divergence, distribution(teacher), distribution(student), gradient)


def compare(divergence: Divergence, p: Distribution, q: Distribution, gradient: bool) -> Rows:
    """Return D(p, q) [rows] and, if asked, its gradient to the student's logits; `p` is overwritten, `q` is not."""
    kind, share = divergence.kind, divergence.parameter or 0.0
    if kind == "total_variation":
        difference = torch.sub(p.probabilities, q.probabilities, out=p.probabilities)
        value = 0.5 * difference.abs().sum(-1)
        return value, _centred(q, difference.sign_().mul_(-0.5)) if gradient else None
    log_ratio = _log_ratio(p, q)
    if kind == "forward_kl":
        value = _dot(p.probabilities, log_ratio)
        return value, torch.sub(q.probabilities, p.probabilities, out=log_ratio) if gradient else None
    if kind == "reverse_kl":
        value = -_dot(q.probabilities, log_ratio)
        return value, _centred(q, log_ratio.neg_()) if gradient else None
    if kind in ("alpha", "renyi"):
        return _power(kind, share, p, q, log_ratio, gradient)
    return _mixture(divergence, p, q, log_ratio, gradient)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return torch.linalg.vecdot(one, other)


def _log_ratio(p: Distribution, q: Distribution) -> Tensor:
    """Return log p - log q, written over the logits of p.

    The logits are subtracted first and their offsets next, so that near p = q no digit is lost to the normalisers.
    """
    return p.logits.sub_(q.logits).sub_(p.top - q.top).add_(torch.log(p.likeliest / q.likeliest))


def _mixture(divergence: Divergence, p: Distribution, q: Distribution, log_ratio: Tensor, gradient: bool) -> Rows:
    """With m = s p + (1-s) q, everything is written with the excess log(m / q) = log1p(s (eˣ - 1))."""
    kind, share = divergence.kind, divergence.parameter or 0.0
    teacher_share = 1 - share if kind == "skew_reverse_kl" else share
    log_ratio = log_ratio.clamp_(max=LARGE_LOG_RATIO)
    excess = torch.expm1(log_ratio).mul_(teacher_share).log1p_()
    if kind == "jsd":
        scale = 1 / (share * (1 - share)) if divergence.normalised else 1.0
        from_teacher = _dot(p.probabilities, log_ratio.sub_(excess))
        value = (share * from_teacher - (1 - share) * _dot(q.probabilities, excess)) * scale
        return value, _centred(q, excess.mul_((share - 1) * scale)) if gradient else None
    if kind == "skew_forward_kl":
        teacher_over_mixture = log_ratio.sub_(excess)
        value = _dot(p.probabilities, teacher_over_mixture)
        return value, _centred(q, teacher_over_mixture.exp_().mul_(share - 1)) if gradient else None
    student_over_mixture = excess.neg_()
    value = _dot(q.probabilities, student_over_mixture)
    if not gradient:
        return value, None
    slope = torch.exp(student_over_mixture, out=log_ratio).mul_(-share).add_(student_over_mixture)
    return value, _centred(q, slope)


def _power(kind: str, share: float, p: Distribution, q: Distribution, log_ratio: Tensor, gradient: bool) -> Rows:
    """With the overlap p^a q^(1-a) = q e^(a x), from log q because eˣ alone overflows."""
    log_likeliest = torch.log(q.likeliest)
    overlap = log_ratio.mul_(share).add_(q.logits).sub_(q.top).add_(log_likeliest).exp_()
    total = overlap.sum(-1, keepdim=True)
    # Sum(overlap) - 1, written so that near p = q no two numbers close to 1 are subtracted.
    excess = torch.sub(overlap, p.probabilities.mul_(share), out=p.probabilities)
    excess = excess.sub_(q.probabilities, alpha=1 - share).sum(-1)
    if kind == "alpha":
        value, scale = excess / (share * (share - 1)), torch.full_like(total, 1 / share)
    else:
        value, scale = torch.log1p(excess) / (share - 1), total.reciprocal()
    if not gradient:
        return value, None
    return value, torch.mul(q.probabilities, total, out=p.probabilities).sub_(overlap).mul_(scale)


def _centred(q: Distribution, slope: Tensor) -> Tensor:
    """Return q ⊙ (f' - Σ q f') from f', which is overwritten.

    The mean is taken off twice: the first leaves values near 0 where q has its mass, the second is the mean of those
    and so has their digits.
    """
    for _ in range(2):
        slope.sub_(_dot(q.probabilities, slope).unsqueeze(-1))
    return slope.mul_(q.probabilities)
