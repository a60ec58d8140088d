"""Feature objectives: one number from a student's features, a teacher's, a mask and perhaps a projector.

A step's loss is Σ over its micro-batches of `feature_loss(…, normaliser=N)` where N is the sum over all micro-batches,
and all ranks, of `feature_normaliser(…)`: the same value and gradient as one batch of them all.

None is invariant to a rotation or a shift of the student, so the student must share the teacher's basis or have a
projector. `cosine` alone does not see the scale of a token. A massive dimension that student and teacher share blinds
`cosine`, and `relative_mse` and `normalised_mse`, whose divisor it fills; it leaves `mse`, `l2` and `huber` as they
are. One that differs takes all of `mse`, and the less of `l2` and `huber`, whose gradient is bounded. With a
`standardiser` every dimension weighs the same and a shared one blinds none; a scale and a shift are seen by all but
`cosine`, on purpose: statistics of the student's own would let its size drift.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch
from torch import Tensor

from xarch_kd.errors import UsageError, suggest
from xarch_kd.losses.standardize import Standardizer
from xarch_kd.ops.projected_distance import projected_distance

# Loss of a mapping file -> the distance that is summed over tokens.
DISTANCES: Final = {
    "mse": "mse",
    "relative_mse": "squared_error",
    "cosine": "cosine",
    "normalised_mse": "normalised_mse",
    "huber": "huber",
    "l2": "l2",
}
# A step without one counted token, or a teacher that is 0, has loss 0 rather than 0/0.
SMALLEST_NORMALISER: Final = 1e-12


class Projection(Protocol):
    """Map from student to teacher features with a linear last layer, so that the projected tensor is never stored."""

    def split(self, student: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return features [..., dim] and what they are multiplied by: weight [teacher, dim], bias [teacher]."""
        ...


def token_count(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return how many tokens count, a float64 scalar, from features [..., dim] and a mask of their leading axes."""
    if mask is None:
        return torch.tensor(features.shape[:-1].numel(), dtype=torch.float64, device=features.device)
    return mask.sum().double()


def teacher_energy(teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return Σ|teacher|² over the tokens that count, a float64 scalar."""
    norms = teacher.detach().float().square().sum(-1).double()
    return norms.sum() if mask is None else norms.masked_fill(~mask, 0.0).sum()


def feature_normalizer(
    kind: str, teacher: Tensor, mask: Tensor | None = None, *, standardizer: Standardizer | None = None
) -> Tensor:
    """Return what this micro-batch adds to the divisor of loss `kind`: energy of the teacher as compared, or tokens."""
    _distance(kind)
    if kind != "relative_mse":
        return token_count(teacher, mask)
    return teacher_energy(teacher if standardizer is None else standardizer.apply(teacher.detach()), mask)


def feature_loss(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    *,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
    projector: Projection | None = None,
    standardizer: Standardizer | None = None,
    epsilon: float = 1e-6,
    delta: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Return this micro-batch's share of loss `kind`, a scalar.

    `student` is [batch, time, student dim] and `teacher` [batch, time, teacher dim]; `mask` [batch, time] is true
    where a token counts. `relative_mse` is Σ|y - t|² over Σ|t|²; the others are means over tokens of the distances of
    `projected_distance`: `huber`, with `delta`, and `l2` among them. With the teacher's `standardiser`, y and t are
    standardised before they are compared. The teacher gets no gradient.

    Raises:
        UsageError: an unknown kind, or shapes that do not fit.
        NonFiniteLoss: the distance of a counted token is NaN or infinite.
    """
    features, weight, bias = (student, None, None) if projector is None else projector.split(student)
    if standardizer is not None:
        features, weight, bias = standardizer.fold(features, weight, bias)
        teacher = standardizer.apply(teacher.detach())
    total = projected_distance(
        features,
        teacher,
        weight=weight,
        bias=bias,
        distance=_distance(kind),
        mask=mask,
        reduction="sum",
        epsilon=epsilon,
        delta=delta,
        impl=impl,
    )
    return total / divisor(normalizer, total)


def divisor(normalizer: Tensor | float, like: Tensor) -> Tensor:
    """Return a normaliser as a scalar of the dtype and device of `like`, at least as large as can be divided by."""
    return torch.as_tensor(normalizer, dtype=like.dtype, device=like.device).clamp(min=SMALLEST_NORMALISER)


def _distance(kind: str) -> str:
    if kind not in DISTANCES:
        raise UsageError(
            f"There is no such feature loss.{suggest(kind, DISTANCES)}", asked=kind, allowed=" | ".join(DISTANCES)
        )
    return DISTANCES[kind]
