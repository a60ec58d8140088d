"""Feature objectives: one number from a student's features, a teacher's, a mask and perhaps a projector.

A step's loss is Σ over its micro-batches of `feature_loss(…, normalizer=N)` where N is the sum over all micro-batches,
and all ranks, of `feature_normalizer(…)`: the same value and gradient as one batch of them all.

None is invariant to a rotation or a shift of the student, so the student must share the teacher's basis or have a
projector. `cosine` alone does not see the scale of a token. A massive dimension that student and teacher share blinds
`cosine`, and `relative_mse` and `normalised_mse`, whose divisor it fills; it leaves `mse`, `l2` and `huber` as they
are. One that differs takes all of `mse`, and the less of `l2` and `huber`, whose gradient is bounded. With a
`standardizer` every dimension weighs the same and a shared one blinds none; a scale and a shift are seen by all but
`cosine`, on purpose: statistics of the student's own would let its size drift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from xarch_kd.losses.standardize import Standardizer
from xarch_kd.ops import checks
from xarch_kd.ops.dispatch import Impl
from xarch_kd.ops.feature_distances import FeatureDistanceName
from xarch_kd.ops.projected_distance import projected_distance
from xarch_kd.ops.tables import look_up, table

FeatureLossKind = Literal["mse", "relative_mse", "cosine", "normalised_mse", "huber", "l2"]


@dataclass(frozen=True, kw_only=True)
class FeatureLoss:
    """A feature loss: the distance that is summed over tokens, and what the sum over the step is divided by.

    With `over_teacher_energy` the divisor is Σ|teacher|² over the valid tokens of the step, else their number.
    """

    name: str
    distance: FeatureDistanceName
    over_teacher_energy: bool = False


LOSSES: Final[Mapping[str, FeatureLoss]] = table(
    "feature losses",
    FeatureLossKind,
    (
        FeatureLoss(name="mse", distance="mse"),
        FeatureLoss(name="relative_mse", distance="squared_error", over_teacher_energy=True),
        FeatureLoss(name="cosine", distance="cosine"),
        FeatureLoss(name="normalised_mse", distance="normalised_mse"),
        FeatureLoss(name="huber", distance="huber"),
        FeatureLoss(name="l2", distance="l2"),
    ),
)
# A step without a valid token, or a teacher that is 0, has loss 0 rather than 0/0.
SMALLEST_NORMALIZER: Final = 1e-12


class Projection(Protocol):
    """Map from student to teacher features with a linear last layer, so that the projected tensor is never stored."""

    def split(self, student: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return features [..., dim] and what they are multiplied by: weight [teacher, dim], bias [teacher]."""
        ...


def token_count(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return how many tokens count, a float64 scalar, from features [..., dim] and a mask of their leading axes.

    >>> import torch
    >>> from xarch_kd.losses import token_count
    >>> token_count(torch.ones(2, 4, 8), torch.tensor([[True] * 4, [True] * 3 + [False]]))
    tensor(7., dtype=torch.float64)
    """
    if mask is None:
        return torch.tensor(features.shape[:-1].numel(), dtype=torch.float64, device=features.device)
    return mask.sum().double()


def teacher_energy(teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return Σ|teacher|² over the tokens that count, a float64 scalar.

    >>> import torch
    >>> from xarch_kd.losses import teacher_energy
    >>> teacher_energy(torch.ones(2, 4, 8))
    tensor(64., dtype=torch.float64)
    """
    norms = teacher.detach().float().square().sum(-1).double()
    return norms.sum() if mask is None else norms.masked_fill(~mask, 0.0).sum()


def feature_normalizer(
    kind: str, teacher: Tensor, mask: Tensor | None = None, *, standardizer: Standardizer | None = None
) -> Tensor:
    """Return what this micro-batch adds to the divisor of loss `kind`: energy of the teacher as compared, or tokens.

    >>> import torch
    >>> from xarch_kd.losses import feature_normalizer
    >>> feature_normalizer("mse", torch.ones(2, 4, 8))
    tensor(8., dtype=torch.float64)
    """
    if not look_up("feature loss", kind, LOSSES).over_teacher_energy:
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
    impl: Impl | str = "auto",
) -> Tensor:
    """Return this micro-batch's share of loss `kind`, a scalar.

    `student` is [batch, time, student dim] and `teacher` [batch, time, teacher dim]; `mask` [batch, time] is true
    at valid tokens. `relative_mse` is Σ|y - t|² over Σ|t|²; the others are means over tokens of the distances of
    `projected_distance`: `huber`, with `delta`, and `l2` among them. With the teacher's `standardizer`, y and t are
    standardized before they are compared. The teacher gets no gradient.

    Raises:
        UsageError: an unknown kind, or shapes that do not fit.
        NonFiniteLoss: the distance of a valid token is NaN or infinite.

    >>> import torch
    >>> from xarch_kd.losses import feature_loss, feature_normalizer
    >>> student, teacher = torch.zeros(2, 4, 8), torch.ones(2, 4, 8)
    >>> feature_loss("mse", student, teacher, normalizer=feature_normalizer("mse", teacher))
    tensor(1.)
    """
    checks.refuse_swapped_sides((student,), (teacher,))
    features, weight, bias = (student, None, None) if projector is None else projector.split(student)
    if standardizer is not None:
        features, weight, bias = standardizer.fold(features, weight, bias)
        teacher = standardizer.apply(teacher.detach())
    total = projected_distance(
        features,
        teacher.detach(),
        weight=weight,
        bias=bias,
        distance=look_up("feature loss", kind, LOSSES).distance,
        mask=mask,
        reduction="sum",
        epsilon=epsilon,
        delta=delta,
        impl=impl,
    ).total
    return total / divisor(normalizer, total)


def divisor(normalizer: Tensor | float, like: Tensor) -> Tensor:
    """Return a normalizer as a scalar of the dtype and device of `like`, at least as large as can be divided by."""
    return torch.as_tensor(normalizer, dtype=like.dtype, device=like.device).clamp(min=SMALLEST_NORMALIZER)
