"""Streaming statistics of student and teacher features, in float64: means and second moments for closed forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.ops import checks

# Tokens converted to float64 at a time.
CHUNK: Final = 4096


class SecondMoments(NamedTuple):
    """Second moments of features x [student dim] and y [teacher dim], means over tokens, all float64.

    `student` [student dim, student dim], `cross` [student dim, teacher dim] of x yᵀ, `teacher` [teacher dim, teacher
    dim], about `student_mean` and `teacher_mean`, which are 0 for moments about 0.
    """

    student: Tensor
    cross: Tensor
    teacher: Tensor
    student_mean: Tensor
    teacher_mean: Tensor


class PairStatistics:
    """Token count, means and products of the features of one pair of layers, over all tokens seen.

    Products are stored about the means (Chan, Golub & LeVeque 1979), so that features with a large offset lose no
    digits. Statistics of disjoint sets of tokens can be merged: the result is that of their union.

    >>> import torch
    >>> from xarch_kd.projectors import PairStatistics
    >>> student = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics = PairStatistics()
    >>> statistics.update(student, 2 * student)
    >>> statistics.tokens
    64
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: dict[str, Tensor] = {}

    @property
    def dims(self) -> tuple[int, int] | None:
        """(student dim, teacher dim), or None before the first token."""
        if not self._sums:
            return None
        student, teacher = self._sums["cross"].shape
        return student, teacher

    def update(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> None:
        """Add features [..., dim] of the same tokens; `mask` has their leading axes and is true for tokens that count.

        Raises:
            UsageError: tensors that do not fit each other, or the earlier ones.
            NonFiniteLoss: a feature of a counted token is NaN or infinite.
        """
        checks.refuse_swapped_sides((student,), (teacher,))
        checks.check_floating(student=student, teacher=teacher)
        leading = tuple(student.shape[:-1])
        checks.check_shape("teacher", teacher, (*leading, teacher.shape[-1]), "[leading axes of student, dim]")
        checks.check_shape("mask", mask, leading, "[leading axes of student]")
        checks.check_mask(mask)
        checks.check_device(student=student, teacher=teacher, mask=mask)
        with torch.no_grad():
            self._take_in(student, teacher, mask)

    def _take_in(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
        x, y = (
            features.reshape(-1, features.shape[-1]) if mask is None else features[mask]
            for features in (student, teacher)
        )
        with torch.autocast(x.device.type, enabled=False):
            for first, second in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                if first.shape[0] > 0:
                    self._add(first.shape[0], _about_means(first.double(), second.double()))

    def merge(self, other: PairStatistics) -> None:
        """Add the tokens of `other`, e.g. of another pair that shares the projector.

        Raises UsageError if the dimensions differ.
        """
        if other._sums:
            self._add(other.tokens, {name: tensor.clone() for name, tensor in other._sums.items()})

    def moments(self, *, centered: bool = True) -> SecondMoments:
        """Return the second moments, central or about 0. Raises UsageError before the first token."""
        if not self._sums:
            raise UsageError("Statistics of no tokens have no moments.", found=0, allowed=">= 1 token")
        sums = self._sums
        x, y = sums["student_mean"], sums["teacher_mean"]
        student, cross, teacher = (sums[name] / self.tokens for name in ("student", "cross", "teacher"))
        if centered:
            return SecondMoments(student, cross, teacher, x, y)
        return SecondMoments(
            student + torch.outer(x, x),
            cross + torch.outer(x, y),
            teacher + torch.outer(y, y),
            torch.zeros_like(x),
            torch.zeros_like(y),
        )

    def state(self) -> dict[str, Tensor]:
        """Return the tensors by name, not copied, for a checkpoint."""
        return {"tokens": torch.tensor(self.tokens), **self._sums}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> PairStatistics:
        """Return the statistics of a `state()`."""
        found = cls()
        found.tokens = int(state["tokens"])
        found._sums = {name: tensor.clone() for name, tensor in state.items() if name != "tokens"}
        return found

    def _add(self, tokens: int, sums: dict[str, Tensor]) -> None:
        if not self._sums:
            self.tokens, self._sums = tokens, sums
            return
        checks.check_shape("features", sums["cross"], tuple(self._sums["cross"].shape), "[dims of the first call]")
        own, together = self._sums, self.tokens + tokens
        gaps = {side: sums[f"{side}_mean"] - own[f"{side}_mean"] for side in ("student", "teacher")}
        share = self.tokens * tokens / together
        for name, left, right in (
            ("student", "student", "student"),
            ("cross", "student", "teacher"),
            ("teacher", "teacher", "teacher"),
        ):
            own[name] += sums[name] + torch.outer(gaps[left], gaps[right]) * share
        for side, gap in gaps.items():
            own[f"{side}_mean"] += gap * (tokens / together)
        self.tokens = together


def _about_means(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the sums of products about the means, and the means, of features [tokens, dim]."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    for side, mean in (("student", mean_x), ("teacher", mean_y)):
        if not bool(torch.isfinite(mean).all()):
            raise NonFiniteLoss(
                f"Features of the {side} are not finite.",
                found="a NaN or infinite value",
                allowed="finite features at every token that counts",
            )
    x, y = x - mean_x, y - mean_y
    return {
        "student": x.T @ x,
        "cross": x.T @ y,
        "teacher": y.T @ y,
        "student_mean": mean_x,
        "teacher_mean": mean_y,
    }
