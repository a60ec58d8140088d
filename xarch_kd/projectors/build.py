"""Construction of projectors by kind."""

from __future__ import annotations

from typing import Final

import torch

from xarch_kd.errors import UsageError, suggest
from xarch_kd.projectors.base import Projector
from xarch_kd.projectors.linear import (
    IdentityProjector,
    LinearProjector,
    LowRankProjector,
    OrthogonalProjector,
    default_rank,
)
from xarch_kd.projectors.mlp import MLPProjector, default_hidden

# Kind -> description.
PROJECTOR_KINDS: Final = {
    "auto": "none if the dimensions are equal, else linear",
    "none": "no projector",
    "identity": "no projector, as a module",
    "linear": "one matrix",
    "low_rank": "the product of two thin matrices",
    "mlp": "one hidden layer",
    "orthogonal": "one matrix that keeps lengths and angles",
}


def resolve_kind(kind: str, student_dim: int, teacher_dim: int) -> str:
    """Return the kind that `auto` stands for, or the kind itself.

    Raises UsageError for an unknown kind, and for `none` or `identity` if the dimensions differ.
    """
    if kind not in PROJECTOR_KINDS:
        raise UsageError(
            f"There is no such projector.{suggest(kind, PROJECTOR_KINDS)}",
            asked=kind,
            allowed=" | ".join(PROJECTOR_KINDS),
        )
    if kind == "auto":
        return "none" if student_dim == teacher_dim else "linear"
    if kind in ("none", "identity") and student_dim != teacher_dim:
        raise UsageError(
            "Without a projector student and teacher must have the same dimension.",
            asked=f"projector: {kind}",
            found=f"student {student_dim}, teacher {teacher_dim}",
            fix="projector: linear, or auto",
        )
    return kind


def build_projector(
    kind: str,
    student_dim: int,
    teacher_dim: int,
    *,
    rank: int | None = None,
    hidden: int | None = None,
    bias: bool = False,
    generator: torch.Generator | None = None,
) -> Projector | None:
    """Return the projector of `kind`, one of PROJECTOR_KINDS, with random weights from `generator`; None for `none`.

    `rank` is for low_rank, `hidden` (number of hidden units) for mlp, `bias` for every kind but identity.

    Raises:
        UsageError: an unknown kind, `none` or `identity` if dimensions differ, an option that is out of range or
            that the kind does not have.
    """
    kind = resolve_kind(kind, student_dim, teacher_dim)
    _check_options(kind, rank, hidden, bias)
    if kind == "none":
        return None
    if kind == "identity":
        return IdentityProjector(student_dim, teacher_dim)
    if kind == "low_rank":
        return LowRankProjector(student_dim, teacher_dim, rank, bias, generator=generator)
    if kind == "mlp":
        return MLPProjector(student_dim, teacher_dim, hidden, bias, generator=generator)
    chosen = OrthogonalProjector if kind == "orthogonal" else LinearProjector
    return chosen(student_dim, teacher_dim, bias, generator=generator)


def parameter_count(
    kind: str,
    student_dim: int,
    teacher_dim: int,
    *,
    rank: int | None = None,
    hidden: int | None = None,
    bias: bool = False,
) -> int:
    """Return the number of parameters of `build_projector` with the same arguments; raises the same errors."""
    kind = resolve_kind(kind, student_dim, teacher_dim)
    _check_options(kind, rank, hidden, bias)
    if kind in ("none", "identity"):
        return 0
    offset = teacher_dim if bias else 0
    if kind == "low_rank":
        return default_rank(student_dim, teacher_dim, rank) * (student_dim + teacher_dim) + offset
    if kind == "mlp":
        return default_hidden(student_dim, teacher_dim, hidden) * (student_dim + 1 + teacher_dim) + offset
    return student_dim * teacher_dim + offset


def _check_options(kind: str, rank: int | None, hidden: int | None, bias: bool) -> None:
    given: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
        ("rank", rank is not None, ("low_rank",)),
        ("hidden", hidden is not None, ("mlp",)),
        ("bias", bias, ("linear", "low_rank", "mlp", "orthogonal")),
    )
    for option, asked, kinds in given:
        # `bias` is ignored without a projector, because `auto` may resolve to none.
        if asked and kind not in kinds and not (option == "bias" and kind == "none"):
            raise UsageError(
                f"This projector has no {option}.", asked=f"{option} of projector: {kind}", allowed=" | ".join(kinds)
            )
