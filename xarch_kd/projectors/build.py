"""Construction of projectors by kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from xarch_kd.errors import UsageError, renamed_arguments, suggest
from xarch_kd.projectors.base import Projector
from xarch_kd.projectors.linear import (
    IdentityProjector,
    LinearProjector,
    LowRankProjector,
    OrthogonalProjector,
    default_rank,
)
from xarch_kd.projectors.mlp import MLPProjector, default_hidden


@dataclass(frozen=True, kw_only=True)
class ProjectorKind:
    """A kind of projector: its constructor and its number of parameters, by (student dim, teacher dim, **options).

    `options` are those of `build_projector` that it takes; `keeps_dim` kinds are for equal dimensions alone.
    """

    build: Callable[..., Projector | None]
    parameters: Callable[..., int]
    options: tuple[str, ...] = ()
    keeps_dim: bool = False


def _none(student_dim: int, teacher_dim: int, *, generator: torch.Generator | None = None) -> None:
    return None


def _identity(student_dim: int, teacher_dim: int, *, generator: torch.Generator | None = None) -> IdentityProjector:
    return IdentityProjector(student_dim, teacher_dim)


def _without_parameters(student_dim: int, teacher_dim: int) -> int:
    return 0


def _matrix(student_dim: int, teacher_dim: int, bias: bool = False) -> int:
    return student_dim * teacher_dim + bias * teacher_dim


def _thin(student_dim: int, teacher_dim: int, rank: int | None = None, bias: bool = False) -> int:
    return default_rank(student_dim, teacher_dim, rank) * (student_dim + teacher_dim) + bias * teacher_dim


def _two_layers(student_dim: int, teacher_dim: int, hidden: int | None = None, bias: bool = False) -> int:
    units = default_hidden(student_dim, teacher_dim, hidden)
    return units * (student_dim + 1 + teacher_dim) + bias * teacher_dim


# `auto` stands for one of these (`resolve_kind`).
PROJECTOR_KINDS: Final[Mapping[str, ProjectorKind]] = {
    "none": ProjectorKind(build=_none, parameters=_without_parameters, keeps_dim=True),
    "identity": ProjectorKind(build=_identity, parameters=_without_parameters, keeps_dim=True),
    "linear": ProjectorKind(build=LinearProjector, parameters=_matrix, options=("bias",)),
    "low_rank": ProjectorKind(build=LowRankProjector, parameters=_thin, options=("rank", "bias")),
    "mlp": ProjectorKind(build=MLPProjector, parameters=_two_layers, options=("hidden", "bias")),
    "orthogonal": ProjectorKind(build=OrthogonalProjector, parameters=_matrix, options=("bias",)),
}


def resolve_kind(kind: str, student_dim: int, teacher_dim: int) -> str:
    """Return the kind that `auto` stands for, or the kind itself.

    Raises UsageError for an unknown kind, and for `none` or `identity` if the dimensions differ.

    >>> from xarch_kd.projectors import resolve_kind
    >>> resolve_kind("auto", 4, 4), resolve_kind("auto", 4, 6)
    ('none', 'linear')
    """
    allowed = ("auto", *PROJECTOR_KINDS)
    if kind not in allowed:
        raise UsageError(
            f"There is no such projector.{suggest(kind, allowed)}", asked=kind, allowed=" | ".join(allowed)
        )
    if kind == "auto":
        return "none" if student_dim == teacher_dim else "linear"
    if PROJECTOR_KINDS[kind].keeps_dim and student_dim != teacher_dim:
        raise UsageError(
            "Without a projector student and teacher must have the same dimension.",
            asked=f"projector: {kind}",
            found=f"student {student_dim}, teacher {teacher_dim}",
            fix="projector: linear, or auto",
        )
    return kind


@renamed_arguments(width="hidden")
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

    >>> from xarch_kd.projectors import build_projector
    >>> type(build_projector("low_rank", 4, 6, rank=2)).__name__
    'LowRankProjector'
    """
    kind = resolve_kind(kind, student_dim, teacher_dim)
    return PROJECTOR_KINDS[kind].build(
        student_dim, teacher_dim, generator=generator, **_options(kind, rank, hidden, bias)
    )


def parameter_count(
    kind: str,
    student_dim: int,
    teacher_dim: int,
    *,
    rank: int | None = None,
    hidden: int | None = None,
    bias: bool = False,
) -> int:
    """Return the number of parameters of `build_projector` with the same arguments; raises the same errors.

    >>> from xarch_kd.projectors import parameter_count
    >>> parameter_count("linear", 4, 6, bias=True)
    30
    """
    kind = resolve_kind(kind, student_dim, teacher_dim)
    return PROJECTOR_KINDS[kind].parameters(student_dim, teacher_dim, **_options(kind, rank, hidden, bias))


def _options(kind: str, rank: int | None, hidden: int | None, bias: bool) -> dict[str, Any]:
    """Return the options that were given. Raises UsageError for one that the kind does not have."""
    given = {"rank": rank, "hidden": hidden, "bias": bias or None}
    found = {name: value for name, value in given.items() if value is not None}
    if kind == "none":
        # `bias` is ignored without a projector, because `auto` may resolve to none.
        found.pop("bias", None)
    for option in found:
        if option not in PROJECTOR_KINDS[kind].options:
            raise UsageError(
                f"This projector has no {option}.",
                asked=f"{option} of projector: {kind}",
                allowed=" | ".join(name for name, row in PROJECTOR_KINDS.items() if option in row.options),
            )
    return found
