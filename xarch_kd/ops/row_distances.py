"""Distances that are functions of three numbers a row: |P|², <P, M> and |M|² of the teacher's and the student's row.

The gradient of each with respect to M is factor × (P - share × M), one pair of numbers a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowStatistics:
    """Numbers of each row: |P|², <P, M>, |M|², and |P - M|², which is summed by itself so that no digits cancel.

    Those that a distance does not need may be None (see `needs`).
    """

    teacher: Tensor | None
    product: Tensor | None
    student: Tensor | None
    error: Tensor | None


def row_values(distance: str, rows: RowStatistics, epsilon: float) -> Tensor:
    """Return the distance of each row."""
    if distance == "cosine":
        teacher, product, student = _three(rows)
        return 1 - product * torch.rsqrt(teacher + epsilon) * torch.rsqrt(student + epsilon)
    assert rows.error is not None
    if distance == "frobenius":
        return rows.error
    assert rows.teacher is not None
    return rows.error / (rows.teacher + epsilon)


def row_slopes(distance: str, rows: RowStatistics, epsilon: float) -> tuple[Tensor | float, Tensor | None]:
    """Return (factor, share) of each row: the gradient is factor × (P - share × M). A share of None is 1."""
    if distance == "cosine":
        teacher, product, student = _three(rows)
        factor = -torch.rsqrt(teacher + epsilon) * torch.rsqrt(student + epsilon)
        return factor, product / (student + epsilon)
    if distance == "frobenius":
        return -2.0, None
    assert rows.teacher is not None
    return -2.0 / (rows.teacher + epsilon), None


def _three(rows: RowStatistics) -> tuple[Tensor, Tensor, Tensor]:
    assert rows.teacher is not None and rows.product is not None and rows.student is not None
    return rows.teacher, rows.product, rows.student


def measure(distance: str, teacher: Tensor, student: Tensor) -> tuple[RowStatistics, Tensor | None]:
    """Return the numbers of each row that `distance` needs, summed over the last axis, and P - M if it was made.

    P - M takes the place of the teacher's entries, which are lost.
    """
    if distance == "cosine":
        return RowStatistics(_squares(teacher), (teacher * student).sum(-1), _squares(student), None), None
    norm = _squares(teacher) if distance == "relative_frobenius" else None
    difference = teacher.sub_(student)
    return RowStatistics(norm, None, None, _squares(difference)), difference


def _squares(entries: Tensor) -> Tensor:
    return torch.linalg.vector_norm(entries, dim=-1).square_()
