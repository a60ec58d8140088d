"""Projectors in closed form, from the statistics of a calibration pass.

x, y are a student's and a teacher's features, C their second moments: about their means where the projector has a bias,
which then is mean(y) - weight mean(x), else about 0. Every form takes a greatest `rank`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from xarch_kd.errors import UsageError, suggest
from xarch_kd.projectors.base import Projector
from xarch_kd.projectors.statistics import PairStatistics, SecondMoments

PENALTY: Final = 1e-3
# Tokens for each dimension, below which a fit says more of the tokens than of the layers.
ENOUGH: Final = 4


class LinearMap(NamedTuple):
    """y = x weightᵀ + offset: weight [teacher dim, student dim], offset [teacher dim] or None, in float64."""

    weight: Tensor
    offset: Tensor | None


def ridge(
    statistics: PairStatistics, *, bias: bool = True, rank: int | None = None, penalty: float = PENALTY
) -> LinearMap:
    """Return the ridge regression of teacher on student, the best one of its rank.

    Minimises mean |weight x + offset - y|² + λ |weight|², λ = penalty · mean eigenvalue of the student's C. Of a lower
    rank it is E Eᵀ weight with E the leading eigenvectors of weight (C + λ) weightᵀ (reduced-rank regression, Izenman
    1975). Raises UsageError for a penalty of at most 0.
    """
    if not penalty > 0:
        raise UsageError("A ridge needs a penalty.", found=penalty, allowed="> 0")
    moments = statistics.moments(centred=bias)
    scale = moments.student.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    regularised = moments.student + penalty * scale * torch.eye(len(moments.student)).to(moments.student)
    weight = torch.linalg.solve(regularised, moments.cross).T
    if rank is not None and rank < min(weight.shape):
        leading = _leading(weight @ regularised @ weight.T, rank)
        weight = leading @ (leading.T @ weight)
    return _with_offset(weight, moments, bias)


def procrustes(
    statistics: PairStatistics, *, bias: bool = True, rank: int | None = None, scaled: bool = True
) -> LinearMap:
    """Return the (scaled) semi-orthogonal map of greatest product with the teacher (Schönemann 1966).

    With C(y, x) = U S Vᵀ it is U Vᵀ of the leading `rank` singular vectors, times tr S / tr Vᵀ C(x) V if `scaled`. For
    students that are not wider than the teacher, and full rank, no such map is nearer to the teacher.
    """
    moments = statistics.moments(centred=bias)
    left, values, right = torch.linalg.svd(moments.cross.T, full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    weight = left @ right
    if scaled:
        energy = (right @ moments.student * right).sum().clamp(min=torch.finfo(torch.float64).tiny)
        weight = weight * (values.sum() / energy)
    return _with_offset(weight, moments, bias)


def pca(statistics: PairStatistics, *, bias: bool = True, rank: int | None = None) -> LinearMap:
    """Return the semi-orthogonal map onto the teacher's leading principal components.

    No map of this rank can explain more of the teacher. Which directions of the student they are is the rotation that
    fits the student best; nothing else is taken from the student, so it suits one that knows nothing yet.
    """
    moments = statistics.moments(centred=bias)
    rank = min(moments.cross.shape) if rank is None else rank
    leading = _leading(moments.teacher, rank)
    left, _, right = torch.linalg.svd(leading.T @ moments.cross.T, full_matrices=False)
    return _with_offset(leading @ (left @ right), moments, bias)


class Form(NamedTuple):
    """A closed form: `fit(projector, statistics)`, and the dimensions that it needs as many tokens as."""

    fit: Callable[[Projector, PairStatistics], LinearMap]
    dimensions: Callable[[Projector], int]


def _ridge(projector: Projector, statistics: PairStatistics) -> LinearMap:
    return ridge(statistics, bias=projector.has_bias, rank=projector.rank)


def _procrustes(projector: Projector, statistics: PairStatistics) -> LinearMap:
    scaled = projector.kind != "orthogonal"
    return procrustes(statistics, bias=projector.has_bias, rank=projector.rank, scaled=scaled)


def _pca(projector: Projector, statistics: PairStatistics) -> LinearMap:
    return pca(statistics, bias=projector.has_bias, rank=projector.rank)


FORMS: Final = {
    "ridge": Form(_ridge, lambda projector: projector.student_dim),
    "procrustes": Form(_procrustes, lambda projector: min(projector.student_dim, projector.teacher_dim)),
    "pca": Form(_pca, lambda projector: projector.rank),
}
STARTS: Final = ("auto", "random", *FORMS)


def resolve_start(how: str, kind: str) -> str:
    """Return the form that `auto` stands for in a projector of `kind`: procrustes for orthogonal, else ridge.

    Raises UsageError for an unknown form, or one that the kind cannot be.
    """
    if how not in STARTS:
        raise UsageError(f"There is no such start.{suggest(how, STARTS)}", asked=how, allowed=" | ".join(STARTS))
    if kind in ("none", "identity"):
        if how in FORMS:
            raise UsageError(f"A projector '{kind}' has nothing to fit.", asked=how, allowed="auto | random")
        return "random"
    if how == "auto":
        return "procrustes" if kind == "orthogonal" else "ridge"
    if how == "ridge" and kind == "orthogonal":
        raise UsageError(
            "A ridge regression is not orthogonal.", asked="ridge of an orthogonal projector", allowed="procrustes, pca"
        )
    return how


def enough_tokens(dimensions: int) -> int:
    """Return how many tokens a fit in so many dimensions should have; with fewer it is warned of."""
    return ENOUGH * dimensions


def initialize(projector: Projector, statistics: PairStatistics, how: str = "auto") -> LinearMap | None:
    """Make a projector the closed form `how` of these statistics, and return that; `random` leaves it as it was built.

    Warns below 4 tokens a dimension.

    Raises:
        UsageError: an unknown form, one that the projector cannot be, other sizes, or fewer tokens than dimensions.
    """
    how = resolve_start(how, projector.kind)
    if how == "random":
        return None
    form = FORMS[how]
    check_dims(projector, statistics)
    _check_tokens(how, statistics.tokens, form.dimensions(projector))
    fitted = form.fit(projector, statistics)
    projector.become(*fitted)
    return fitted


def explained_variance(statistics: PairStatistics, weight: Tensor | None, offset: Tensor | None = None) -> float:
    """Return 1 - mean |weight x + offset - y|² / mean |y - mean(y)|², at most 1; without a weight x is compared itself.

    Of tokens that the map was fitted to it is too high: with as many dimensions as tokens it is 1 for noise. 0 for a
    teacher that does not vary.
    """
    moments = statistics.moments()
    if weight is None:
        weight = torch.eye(moments.student.shape[0])
    weight = weight.detach().to(moments.student)
    gap = weight @ moments.student_mean - moments.teacher_mean
    if offset is not None:
        gap = gap + offset.detach().to(gap)
    total = moments.teacher.trace()
    if not bool(total > 0):
        return 0.0
    products = (weight @ moments.student * weight).sum() - 2 * (weight * moments.cross.T).sum()
    return float(-(products + gap @ gap) / total)


def ceiling(statistics: PairStatistics, rank: int) -> float:
    """Return the share of the teacher's variance in its leading `rank` components: what no map of it exceeds."""
    values = torch.linalg.eigvalsh(statistics.moments().teacher).clamp(min=0)
    total = float(values.sum())
    return float(values[max(len(values) - rank, 0) :].sum()) / total if total > 0 else 0.0


def check_dims(projector: Projector, statistics: PairStatistics, features: int | None = None) -> None:
    """Raise UsageError unless statistics are of `features` (None: student dim) and the teacher's of a projector."""
    allowed = (projector.student_dim if features is None else features, projector.teacher_dim)
    if statistics.dims is not None and statistics.dims != allowed:
        raise UsageError(
            "The statistics are of other dimensions than the projector.", found=statistics.dims, allowed=allowed
        )


def _leading(symmetric: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors [dim, rank] of the greatest eigenvalues, greatest first."""
    return torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :rank]


def _with_offset(weight: Tensor, moments: SecondMoments, bias: bool) -> LinearMap:
    return LinearMap(weight, moments.teacher_mean - weight @ moments.student_mean if bias else None)


def _check_tokens(how: str, tokens: int, dimensions: int) -> None:
    enough = enough_tokens(dimensions)
    if tokens <= dimensions:
        raise UsageError(
            f"{how} of a projector is fitted to more tokens than it has dimensions.",
            found=f"{tokens} tokens",
            allowed=f">= {dimensions + 1}; {enough} say more",
            fix=f"calibrate on {enough} tokens, or init: random",
        )
    if tokens < enough:
        warnings.warn(
            f"{how} is fitted to {tokens} tokens in {dimensions} dimensions: it follows the tokens as much as the "
            f"layers. Calibrate on at least {enough}.",
            UserWarning,
            stacklevel=3,
        )
