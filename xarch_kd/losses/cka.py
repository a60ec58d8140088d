"""One minus the similarity (linear CKA) of student and teacher: no projector, any dimensions."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.losses.blocks import finite
from xarch_kd.losses.features import divisor
from xarch_kd.losses.standardize import Standardizer
from xarch_kd.ops import checks

# HSIC_1 divides by n - 3.
LEAST_TOKENS: Final = 4
# Of features whose tokens have a mean square of 1: the dependence of features that do not vary, without 0/0.
LEAST_DEPENDENCE: Final = 1e-7


def cka_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
    standardizer: Standardizer | None = None,
    shared_basis: bool = False,
) -> Tensor:
    """Return this micro-batch's share of 1 - CKA, weighted by its tokens; student and teacher [..., dim] of each.

    CKA = HSIC(x, y) / √(HSIC(x, x) HSIC(y, y)) with HSIC_1 (Song et al. 2012, eq. 5; `ops.reference.similarity`),
    which has no bias. The loss is 0 for equal features, near 1 for independent ones, perhaps slightly above. It is no
    sum over tokens: micro-batches add up to the mean of their own 1 - CKA, which is not that of one large batch. A
    micro-batch of fewer than 4 tokens that count adds 0; with fewer than 4 per dimension value and gradient are more
    noise than signal.

    A massive token, as the first of a sequence may be, costs digits in float32: leave it out by `mask`.

    Invariant to a rotation, a scale and a shift of the student; not to scales of single tokens or dimensions. Blinded
    by a massive dimension that both share and that varies over tokens (a constant one is a shift). The teacher's
    `standardizer` cures it: with `shared_basis`, where the dimensions of the student are those of the teacher, as in a
    converted one, both are standardized, and a rotation is seen; without, the teacher alone is, and the student learns
    to do without massive dimensions.

    Raises:
        UsageError: tensors that do not fit.
        NonFiniteLoss: a feature of a valid token is NaN or infinite.

    >>> import torch
    >>> from xarch_kd.losses import cka_loss, token_count
    >>> teacher = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
    >>> abs(float(cka_loss(2 * teacher, teacher, normalizer=1.0))) < 1e-3
    True
    """
    checks.refuse_swapped_sides((student,), (teacher,))
    checks.check_floating(student=student, teacher=teacher)
    leading = tuple(student.shape[:-1])
    checks.check_shape("teacher", teacher, (*leading, teacher.shape[-1]), "[leading axes of student, teacher dim]")
    checks.check_shape("mask", mask, leading, "[leading axes of student]")
    checks.check_mask(mask)
    checks.check_device(student=student, teacher=teacher, mask=mask)
    dtype = checks.accumulation_dtype(student, teacher)
    valid_indices = checks.valid_token_indices(math.prod(leading), mask, student.device)
    x, y = (features.flatten(0, -2) for features in (student, teacher.detach()))
    if valid_indices is not None:
        x, y = x.index_select(0, valid_indices), y.index_select(0, valid_indices)
    tokens = x.shape[0]
    with torch.autocast(student.device.type, enabled=False):
        x, y = standardized(x.to(dtype), y.to(dtype), standardizer, shared_basis)
        if tokens < LEAST_TOKENS:
            return x.sum() * 0
        return finite((1 - _cka(x, y)) * (tokens / divisor(normalizer, x)), "cka")


def standardized(
    student: Tensor, teacher: Tensor, standardizer: Standardizer | None, shared_basis: bool
) -> tuple[Tensor, Tensor]:
    """Return the teacher standardized, and the student too if its dimensions are the teacher's.

    Raises UsageError for a shared basis of unequal dimensions.
    """
    if standardizer is None:
        return student, teacher
    if not shared_basis:
        return student, standardizer.apply(teacher)
    if student.shape[-1] != teacher.shape[-1]:
        raise UsageError(
            "Models of unequal dimensions do not share their dimensions.",
            asked="shared_basis=True",
            found=f"student {student.shape[-1]}, teacher {teacher.shape[-1]}",
            fix="shared_basis=False: the teacher alone is standardized",
        )
    return standardizer.apply(student), standardizer.apply(teacher)


def _cka(x: Tensor, y: Tensor) -> Tensor:
    x, y = _centered(x), _centered(y)
    with torch.no_grad():
        teacher = _hsic(y, y).clamp(min=LEAST_DEPENDENCE)
    return _hsic(x, y) / (_hsic(x, x).clamp(min=LEAST_DEPENDENCE) * teacher).sqrt()


def _centered(features: Tensor) -> Tensor:
    """Return centered features with a mean square of 1 per token, for numerical accuracy.

    CKA changes with neither, so both are constants to its gradient.
    """
    with torch.no_grad():
        mean = features.mean(0)
        size = (features - mean).square().sum(1).mean().sqrt().clamp(min=torch.finfo(features.dtype).tiny)
    return (features - mean) / size


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """Return HSIC_1 from dim × dim products (formulas of `ops.streaming.similarity`), differentiable."""
    count = x.shape[0]
    x_norms, y_norms = x.square().sum(1), y.square().sum(1)
    products, x_sum, y_sum, both = x.T @ y, x.sum(0), y.sum(0), x_norms @ y_norms
    trace = products.square().sum() - both
    total = (x_sum @ x_sum - x_norms.sum()) * (y_sum @ y_sum - y_norms.sum()) / ((count - 1) * (count - 2))
    rows = x_sum @ products @ y_sum - x_sum @ (y_norms @ x) - y_sum @ (x_norms @ y) + both
    return (trace + total - 2 * rows / (count - 2)) / (count * (count - 3))
