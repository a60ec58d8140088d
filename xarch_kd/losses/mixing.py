"""The mixing objective: token-mixing matrices of a student's layer and a teacher's, compared row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.losses.features import divisor
from xarch_kd.mixing import Mixing
from xarch_kd.ops.dispatch import MixingImpl
from xarch_kd.ops.mixing_distance import mixing_distance
from xarch_kd.ops.row_distances import MixingDistanceName


def mixing_loss(
    distance: MixingDistanceName,
    student: Mixing,
    teacher: Mixing,
    *,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
    head_map: Tensor | None = None,
    impl: MixingImpl | str = "auto",
    probes: int = 64,
    seed: int | torch.Generator | None = None,
) -> Tensor:
    """Return this micro-batch's share of the mean over tokens and student heads of the rows' distance, a scalar.

    `normalizer` is the number of tokens [of mask, or all] of the whole step, all micro-batches and ranks; `head_map`
    [student heads, teacher heads] mixes the teacher's heads (None: one to one); `probes` and `seed` are those of
    `impl="sketch"`. The teacher gets no gradient.

    Raises:
        UsageError: matrices, head map or distance do not fit each other.
        NonFiniteLoss: the distance of a valid row is NaN or infinite.

    >>> import torch
    >>> from xarch_kd.losses import mixing_loss
    >>> from xarch_kd.mixing import SoftmaxMixing
    >>> mixing = SoftmaxMixing(query=torch.randn(1, 6, 4, 8), key=torch.randn(1, 6, 4, 8), scale=8**-0.5)
    >>> abs(float(mixing_loss("cosine", mixing, mixing, normalizer=6))) < 1e-5
    True
    """
    total = mixing_distance(
        student,
        teacher,
        distance=distance,
        head_map=head_map,
        mask=mask,
        reduction="sum",
        impl=impl,
        probes=probes,
        seed=seed,
    ).total
    return total / divisor(normalizer, total) / student.heads
