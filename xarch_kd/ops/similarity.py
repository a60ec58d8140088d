"""Similarity of the representations of two layers: debiased linear CKA, streamed.

CKA = HSIC(student, teacher) / sqrt(HSIC(student, student) HSIC(teacher, teacher)) (Kornblith et al. 2019,
arXiv:1905.00414), with HSIC_1 of `reference.similarity` for each. It is 1 for features that differ by a rotation and a
scale, near 0 for independent ones, and may be slightly negative. A measure, not a loss: nothing has a gradient.

Tokens of one sequence depend on each other, and that alone makes independent models look alike: give one batch of
`LayerSimilarity`, or one call, tokens of the same position of many sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.ops import checks
from xarch_kd.ops.dispatch import SimilarityImpl, choose
from xarch_kd.ops.reference.similarity import dependences
from xarch_kd.ops.streaming.similarity import Moments, centered_gram

# HSIC_1 divides by n - 3.
LEAST_TOKENS: Final = 4
CHUNK: Final = 4096


class Similarity(NamedTuple):
    """Debiased CKA, `total`, and the HSIC_1 it is made of: scalars, or [student layers, teacher layers] and one per
    layer.

    HSIC_1 of many batches is summed before the division; never average CKA.

    >>> import torch
    >>> from xarch_kd import ops
    >>> features = torch.randn(2, 64, 8)
    >>> ops.similarity(features, features)._fields
    ('total', 'together', 'student', 'teacher')
    """

    total: Tensor
    together: Tensor
    student: Tensor
    teacher: Tensor


def similarity(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    impl: SimilarityImpl | str = "auto",
    chunk_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Similarity:
    """Return the similarity of features [tokens, student dim] and [tokens, teacher dim] of the same tokens.

    There may be more leading axes; `mask` has them, boolean, true where a token counts. `chunk_size` tokens are taken
    in at a time by `impl="streaming"`; sums are kept in `dtype`.

    Raises:
        UsageError: tensors that do not fit, fewer than 4 tokens, features that do not vary.
        NonFiniteLoss: a feature is NaN or infinite.

    >>> import torch
    >>> from xarch_kd import ops
    >>> features = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    >>> round(float(ops.similarity(features, 2 * features).total), 3)
    1.0
    """
    checks.check_chunk_size(chunk_size)
    checks.refuse_swapped_sides((student,), (teacher,))
    implementation = choose("similarity", impl)
    student, teacher = _tokens(student, teacher, mask)
    if implementation == "reference":
        _check_count(student.shape[0])
        with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
            return _ratio(*dependences(student, teacher, dtype))
    sums = SimilaritySums(dtype=dtype)
    chunk = chunk_size or CHUNK
    for start in range(0, student.shape[0], chunk):
        sums.update(student[start : start + chunk], teacher[start : start + chunk])
    return sums.result()


class SimilaritySums:
    """Similarity of one pair of layers over all tokens ever taken in: exact, and kept as sums of dim × dim.

    The sums are of features less a fixed `reference` (student's and teacher's [dim]), which changes nothing in exact
    arithmetic and keeps the digits of features with a large offset. By default it is the mean of the first tokens; sums
    that are to be merged must share it.

    >>> import torch
    >>> from xarch_kd import ops
    >>> sums = ops.SimilaritySums()
    >>> sums.update(torch.randn(2, 64, 8), torch.randn(2, 64, 8))
    """

    def __init__(self, *, reference: tuple[Tensor, Tensor] | None = None, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.tokens = 0
        self.reference: tuple[Tensor, Tensor] | None = None
        self._moments: tuple[Moments, Moments, Moments] | None = None
        if reference is not None:
            self._begin(reference[0].detach().to(dtype), reference[1].detach().to(dtype))

    def update(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> None:
        """Take in features of the same tokens, shaped as `similarity` takes them."""
        checks.refuse_swapped_sides((student,), (teacher,))
        with torch.no_grad():
            self._update(student, teacher, mask)

    def _update(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
        student, teacher = (features.to(self.dtype) for features in _tokens(student, teacher, mask))
        if student.shape[0] == 0:
            return
        if self.reference is None:
            self._begin(student.mean(0), teacher.mean(0))
        assert self.reference is not None and self._moments is not None
        for name, features, mean in zip(("student", "teacher"), (student, teacher), self.reference, strict=True):
            checks.check_shape(name, features, (features.shape[0], mean.shape[0]), "[tokens, dim of the first call]")
        x, y = student - self.reference[0], teacher - self.reference[1]
        self.tokens += x.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            for moments, sides in zip(self._moments, ((x, y), (x, x), (y, y)), strict=True):
                moments.update(*sides)

    def merge(self, other: SimilaritySums) -> None:
        """Add the tokens that `other` took in.

        Raises UsageError when the two do not share their reference.
        """
        if other.reference is None or other._moments is None:
            return
        if self.reference is None:
            self._begin(*other.reference)
        assert self.reference is not None and self._moments is not None
        pairs = list(zip(self.reference, other.reference, strict=True))
        if not all(mine.shape == theirs.shape and torch.equal(mine, theirs) for mine, theirs in pairs):
            raise UsageError(
                "Sums with different references cannot be added.",
                fix="make the second with SimilaritySums(reference=first.reference)",
            )
        self.tokens += other.tokens
        for mine, theirs in zip(self._moments, other._moments, strict=True):
            mine.merge(theirs)

    def result(self) -> Similarity:
        """Return the similarity over all tokens.

        Raises UsageError for fewer than 4 tokens or features that do not vary.
        """
        _check_count(self.tokens)
        assert self._moments is not None
        together, student, teacher = (moments.hsic(self.tokens) for moments in self._moments)
        return _ratio(together, student, teacher)

    def _begin(self, student: Tensor, teacher: Tensor) -> None:
        self.reference = student, teacher
        sides = ((student, teacher), (student, student), (teacher, teacher))
        first, second, third = (Moments.empty(x.shape[0], y.shape[0], self.dtype, x.device) for x, y in sides)
        self._moments = first, second, third


class LayerSimilarity:
    """Similarity of every student layer with every teacher layer: one Gram matrix per layer and batch, HSIC_1 summed.

    Only products of tokens of one batch enter, so larger batches are more informative; a batch needs at least 4 tokens.

    >>> import torch
    >>> from xarch_kd import ops
    >>> layers = ops.LayerSimilarity()
    >>> layers.update([torch.randn(2, 64, 8)], [torch.randn(2, 64, 8), torch.randn(2, 64, 8)])
    """

    def __init__(self, *, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.batches = 0
        self._together: Tensor | None = None
        self._student: Tensor | None = None
        self._teacher: Tensor | None = None

    def update(self, students: Sequence[Tensor], teachers: Sequence[Tensor], *, mask: Tensor | None = None) -> None:
        """Take in one batch: the features of the same tokens in each student layer and in each teacher layer."""
        if not students or not teachers:
            raise UsageError("There are no layers to compare.", found=f"{len(students)} and {len(teachers)} layers")
        checks.refuse_swapped_sides(students, teachers)
        with torch.no_grad():
            student, teacher = self._grams(students, teachers[0], mask), self._grams(teachers, students[0], mask)
            count = student.shape[1]
            scale = 1 / (count * (count - 3))
            with torch.autocast(student.device.type, enabled=False):
                student, teacher = student.flatten(1), teacher.flatten(1)
                parts = (student @ teacher.T, student.square().sum(1), teacher.square().sum(1))
            self._add(*(part * scale for part in parts), batches=1)

    def merge(self, other: LayerSimilarity) -> None:
        """Add the batches that `other` took in, of as many layers."""
        if other._together is None or other._student is None or other._teacher is None:
            return
        self._add(other._together, other._student, other._teacher, batches=other.batches)

    def result(self) -> Similarity:
        """Return the similarity of each pair of layers.

        Raises UsageError for no batch or features that do not vary.
        """
        if self._together is None or self._student is None or self._teacher is None:
            raise UsageError("There is no similarity of no tokens.", found="no batch", allowed=">= 1 batch")
        return _ratio(self._together, self._student, self._teacher)

    def _grams(self, layers: Sequence[Tensor], other: Tensor, mask: Tensor | None) -> Tensor:
        found = []
        for features in layers:
            tokens, _ = _tokens(features, other, mask)
            _check_count(tokens.shape[0])
            with torch.autocast(tokens.device.type, enabled=False):
                found.append(centered_gram(tokens, self.dtype))
        return torch.stack(found)

    def _add(self, together: Tensor, student: Tensor, teacher: Tensor, *, batches: int) -> None:
        if self._together is None or self._student is None or self._teacher is None:
            self._together, self._student, self._teacher = together.clone(), student.clone(), teacher.clone()
        else:
            checks.check_shape("layers", together, tuple(self._together.shape), "[student layers, teacher layers]")
            self._together += together
            self._student += student
            self._teacher += teacher
        self.batches += batches


def _tokens(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both as [tokens that count, dim], after checking that they fit."""
    checks.check_floating(student=student, teacher=teacher)
    if student.dim() < 2:
        raise UsageError("student does not fit.", found=list(student.shape), allowed="[tokens, dim] or more axes")
    leading = student.shape[:-1]
    checks.check_shape("teacher", teacher, (*leading, teacher.shape[-1]), "[leading axes of student, teacher dim]")
    checks.check_shape("mask", mask, tuple(leading), "[leading axes of student]")
    checks.check_mask(mask)
    checks.check_device(student=student, teacher=teacher, mask=mask)
    valid_indices = checks.valid_token_indices(math.prod(leading), mask, student.device)
    flat = (features.detach().reshape(-1, features.shape[-1]) for features in (student, teacher))
    first, second = (features if valid_indices is None else features[valid_indices] for features in flat)
    return first, second


def _check_count(tokens: int) -> None:
    if tokens < LEAST_TOKENS:
        raise UsageError(
            "There is no debiased similarity of so few tokens.", found=tokens, allowed=f">= {LEAST_TOKENS}"
        )


def _ratio(together: Tensor, student: Tensor, teacher: Tensor) -> Similarity:
    if not all(bool(torch.isfinite(part).all()) for part in (together, student, teacher)):
        raise NonFiniteLoss(
            "The similarity is not finite.", found="a NaN or infinite feature", allowed="finite features"
        )
    for side, own in (("student", student), ("teacher", teacher)):
        if not bool((own > 0).all()):
            raise UsageError(f"The features of the {side} do not vary over the tokens.", found=own.min().item())
    lengths = torch.outer(student, teacher) if student.dim() else student * teacher
    return Similarity(together / lengths.sqrt(), together, student, teacher)
