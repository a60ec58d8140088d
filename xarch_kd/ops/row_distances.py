"""Distances of two rows of token-mixing matrices, P of the teacher and M of the student: one table of formulas.

`FORMULAS` is read by every implementation of `mixing_distance`. Distances of entries are functions of three numbers per
row, |P|², <P, M> and |M|²; the gradient of each with respect to M is factor × (P - share × M), one pair of numbers per
row. Distances of logarithms are Σ P log M of two softmaxes, with or without the teacher's entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from xarch_kd.ops.tables import table

MixingDistanceName = Literal["kl", "cross_entropy", "frobenius", "relative_frobenius", "cosine"]


@dataclass(frozen=True)
class RowStatistics:
    """Numbers of each row: |P|², <P, M>, |M|², and |P - M|², which is summed separately to avoid cancellation.

    Those that a distance does not need may be None.
    """

    teacher: Tensor | None
    product: Tensor | None
    student: Tensor | None
    error: Tensor | None


@dataclass(frozen=True, kw_only=True)
class EntryFormula:
    """A distance of entries.

    - `dense(student, teacher, epsilon)`: rows from whole matrices, the specification;
    - `measure(student, teacher)`: the statistics that are needed, summed over the last axis, and P - M if it was made;
      P - M takes the place of the teacher's entries, which are lost;
    - `values(statistics, epsilon)`: rows from statistics;
    - `slopes(statistics, epsilon)`: (factor, share) of each row, a share of None being 1;
    - `of_products(pp, pm, mm, epsilon)`: rows from the sums of the kernels, None if the kernels cannot give it;
    - `is_sum_of_squares`: random probes estimate it without bias.
    """

    name: str
    dense: Callable[[Tensor, Tensor, float], Tensor]
    measure: Callable[[Tensor, Tensor], tuple[RowStatistics, Tensor | None]]
    values: Callable[[RowStatistics, float], Tensor]
    slopes: Callable[[RowStatistics, float], tuple[Tensor | float, Tensor | None]]
    of_products: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None
    is_sum_of_squares: bool = False


@dataclass(frozen=True, kw_only=True)
class LogarithmFormula:
    """A distance of logarithms, -Σ P log M, plus Σ P log P if `with_entropy`: P must then be a distribution.

    `kernel` is its code in `kernels/mixing_softmax.py`, None if there is none.
    """

    name: str
    with_entropy: bool
    kernel: str | None = None


def _squares(entries: Tensor) -> Tensor:
    return torch.linalg.vector_norm(entries, dim=-1).square_()


def _cosine(student: Tensor, teacher: Tensor, epsilon: float) -> Tensor:
    norm = teacher.square().sum(-1) + epsilon
    return 1 - (teacher * student).sum(-1) / (norm * (student.square().sum(-1) + epsilon)).sqrt()


def _cosine_statistics(student: Tensor, teacher: Tensor) -> tuple[RowStatistics, Tensor | None]:
    return RowStatistics(_squares(teacher), (teacher * student).sum(-1), _squares(student), None), None


def _cosine_values(rows: RowStatistics, epsilon: float) -> Tensor:
    teacher, product, student = _three(rows)
    return 1 - product * torch.rsqrt(teacher + epsilon) * torch.rsqrt(student + epsilon)


def _cosine_slopes(rows: RowStatistics, epsilon: float) -> tuple[Tensor | float, Tensor | None]:
    teacher, product, student = _three(rows)
    factor = -torch.rsqrt(teacher + epsilon) * torch.rsqrt(student + epsilon)
    return factor, product / (student + epsilon)


def _cosine_of_products(pp: Tensor, pm: Tensor, mm: Tensor, epsilon: float) -> Tensor:
    return 1 - pm / ((pp + epsilon).sqrt() * (mm + epsilon).sqrt())


def _frobenius(student: Tensor, teacher: Tensor, epsilon: float) -> Tensor:
    return (teacher - student).square().sum(-1)


def _frobenius_statistics(student: Tensor, teacher: Tensor) -> tuple[RowStatistics, Tensor | None]:
    difference = teacher.sub_(student)
    return RowStatistics(None, None, None, _squares(difference)), difference


def _frobenius_values(rows: RowStatistics, epsilon: float) -> Tensor:
    assert rows.error is not None
    return rows.error


def _frobenius_slopes(rows: RowStatistics, epsilon: float) -> tuple[Tensor | float, Tensor | None]:
    return -2.0, None


def _frobenius_of_products(pp: Tensor, pm: Tensor, mm: Tensor, epsilon: float) -> Tensor:
    return pp - 2 * pm + mm


def _relative_frobenius(student: Tensor, teacher: Tensor, epsilon: float) -> Tensor:
    return (teacher - student).square().sum(-1) / (teacher.square().sum(-1) + epsilon)


def _relative_frobenius_statistics(student: Tensor, teacher: Tensor) -> tuple[RowStatistics, Tensor | None]:
    norm = _squares(teacher)
    difference = teacher.sub_(student)
    return RowStatistics(norm, None, None, _squares(difference)), difference


def _relative_frobenius_values(rows: RowStatistics, epsilon: float) -> Tensor:
    assert rows.error is not None and rows.teacher is not None
    return rows.error / (rows.teacher + epsilon)


def _relative_frobenius_slopes(rows: RowStatistics, epsilon: float) -> tuple[Tensor | float, Tensor | None]:
    assert rows.teacher is not None
    return -2.0 / (rows.teacher + epsilon), None


def _relative_frobenius_of_products(pp: Tensor, pm: Tensor, mm: Tensor, epsilon: float) -> Tensor:
    return (pp - 2 * pm + mm) / (pp + epsilon)


def _three(rows: RowStatistics) -> tuple[Tensor, Tensor, Tensor]:
    assert rows.teacher is not None and rows.product is not None and rows.student is not None
    return rows.teacher, rows.product, rows.student


FORMULAS: Final[Mapping[str, EntryFormula | LogarithmFormula]] = table(
    "mixing distances",
    MixingDistanceName,
    (
        LogarithmFormula(name="kl", with_entropy=True, kernel="kl"),
        LogarithmFormula(name="cross_entropy", with_entropy=False, kernel="cross_entropy"),
        EntryFormula(
            name="frobenius",
            dense=_frobenius,
            measure=_frobenius_statistics,
            values=_frobenius_values,
            slopes=_frobenius_slopes,
            of_products=_frobenius_of_products,
            is_sum_of_squares=True,
        ),
        EntryFormula(
            name="relative_frobenius",
            dense=_relative_frobenius,
            measure=_relative_frobenius_statistics,
            values=_relative_frobenius_values,
            slopes=_relative_frobenius_slopes,
            of_products=_relative_frobenius_of_products,
        ),
        EntryFormula(
            name="cosine",
            dense=_cosine,
            measure=_cosine_statistics,
            values=_cosine_values,
            slopes=_cosine_slopes,
            of_products=_cosine_of_products,
        ),
    ),
)
