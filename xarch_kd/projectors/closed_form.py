"""Closed-form solutions for projectors, from the statistics of a calibration pass.

x and y are the student's and the teacher's features, C their second moments: central if the projector has a bias,
which then is mean(y) - weight mean(x), else about 0. Every form takes a maximum `rank`.
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
# Tokens per dimension below which a fit overfits the calibration tokens.
ENOUGH: Final = 4


class LinearMap(NamedTuple):
    """Map y = x weightᵀ + offset: weight [teacher dim, student dim], offset [teacher dim] or None, in float64.

    >>> import torch
    >>> from xarch_kd.projectors import PairStatistics, ridge
    >>> student = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics = PairStatistics()
    >>> statistics.update(student, 2 * student)
    >>> ridge(statistics, bias=False).offset is None
    True
    """

    weight: Tensor
    offset: Tensor | None


def ridge(
    statistics: PairStatistics, *, bias: bool = True, rank: int | None = None, penalty: float = PENALTY
) -> LinearMap:
    """Return the ridge regression of teacher on student, at most of the given rank.

    Minimizes mean |weight x + offset - y|² + λ |weight|², λ = penalty · mean eigenvalue of the student's C. For a lower
    rank it is E Eᵀ weight with E the leading eigenvectors of weight (C + λ) weightᵀ (reduced-rank regression, Izenman
    1975). Raises UsageError unless the penalty is positive.

    >>> import torch
    >>> from xarch_kd.projectors import PairStatistics, ridge
    >>> student = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics = PairStatistics()
    >>> statistics.update(student, 2 * student)
    >>> torch.allclose(ridge(statistics, penalty=1e-6).weight.float(), 2 * torch.eye(4), atol=1e-4)
    True
    """
    if not penalty > 0:
        raise UsageError("A ridge regression needs a positive penalty.", found=penalty, allowed="> 0")
    moments = statistics.moments(centered=bias)
    scale = moments.student.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    regularized = moments.student + penalty * scale * torch.eye(len(moments.student)).to(moments.student)
    weight = torch.linalg.solve(regularized, moments.cross).T
    if rank is not None and rank < min(weight.shape):
        leading = _leading(weight @ regularized @ weight.T, rank)
        weight = leading @ (leading.T @ weight)
    return _with_offset(weight, moments, bias)


def procrustes(
    statistics: PairStatistics, *, bias: bool = True, rank: int | None = None, scaled: bool = True
) -> LinearMap:
    """Return the (scaled) semi-orthogonal map with the largest inner product with the teacher (Schönemann 1966).

    With C(y, x) = U S Vᵀ it is U Vᵀ of the leading `rank` singular vectors, times tr S / tr Vᵀ C(x) V if `scaled`. At
    full rank and student dim <= teacher dim it is also the nearest such map to the teacher.

    >>> import torch
    >>> from xarch_kd.projectors import PairStatistics, procrustes
    >>> student = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics = PairStatistics()
    >>> statistics.update(student, 2 * student)
    >>> torch.allclose(procrustes(statistics).weight.float(), 2 * torch.eye(4), atol=1e-4)
    True
    """
    moments = statistics.moments(centered=bias)
    left, values, right = torch.linalg.svd(moments.cross.T, full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    weight = left @ right
    if scaled:
        energy = (right @ moments.student * right).sum().clamp(min=torch.finfo(torch.float64).tiny)
        weight = weight * (values.sum() / energy)
    return _with_offset(weight, moments, bias)


def pca(statistics: PairStatistics, *, bias: bool = True, rank: int | None = None) -> LinearMap:
    """Return the semi-orthogonal map onto the teacher's leading principal components.

    No map of this rank can explain more of the teacher's variance. The rotation within the components is the one that
    fits the student best; nothing else depends on the student, so this suits an untrained student.

    >>> import torch
    >>> from xarch_kd.projectors import PairStatistics, pca
    >>> student = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics = PairStatistics()
    >>> statistics.update(student, 2 * student)
    >>> pca(statistics, rank=2).weight.shape
    torch.Size([4, 4])
    """
    moments = statistics.moments(centered=bias)
    rank = min(moments.cross.shape) if rank is None else rank
    leading = _leading(moments.teacher, rank)
    left, _, right = torch.linalg.svd(leading.T @ moments.cross.T, full_matrices=False)
    return _with_offset(leading @ (left @ right), moments, bias)


class Form(NamedTuple):
    """Closed form: `fit(projector, statistics)`, and the number of tokens that it needs at least, `dimensions`."""

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
INITS: Final = ("auto", "random", *FORMS)


def resolve_init(how: str, kind: str) -> str:
    """Return the form that `auto` stands for in a projector of `kind`: procrustes for orthogonal, else ridge.

    Raises UsageError for an unknown form, or one that the kind cannot represent.

    >>> from xarch_kd.projectors import resolve_init
    >>> resolve_init("auto", "linear"), resolve_init("auto", "orthogonal")
    ('ridge', 'procrustes')
    """
    if how not in INITS:
        raise UsageError(f"There is no such initialization.{suggest(how, INITS)}", asked=how, allowed=" | ".join(INITS))
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
    """Return the number of tokens that a fit in `dimensions` should have; with fewer a warning is given.

    >>> from xarch_kd.projectors import enough_tokens
    >>> enough_tokens(64)
    256
    """
    return ENOUGH * dimensions


def initialize(projector: Projector, statistics: PairStatistics, how: str = "auto") -> LinearMap | None:
    """Make a projector the closed form `how` of these statistics, and return that; `random` leaves it as it was built.

    Warns below 4 tokens per dimension.

    Raises:
        UsageError: an unknown form, one that the projector cannot represent, other dimensions, or too few tokens.

    >>> import torch
    >>> from xarch_kd.projectors import PairStatistics, LinearProjector, initialize
    >>> student = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics = PairStatistics()
    >>> statistics.update(student, 2 * student)
    >>> projector = LinearProjector(4, 4)
    >>> initialize(projector, statistics) is not None
    True
    >>> torch.allclose(projector(student), 2 * student, atol=0.1)
    True
    """
    how = resolve_init(how, projector.kind)
    if how == "random":
        return None
    form = FORMS[how]
    check_dims(projector, statistics)
    _check_tokens(how, statistics.tokens, form.dimensions(projector))
    fitted = form.fit(projector, statistics)
    projector.set_linear_map(*fitted)
    return fitted


def explained_variance(statistics: PairStatistics, weight: Tensor | None, offset: Tensor | None = None) -> float:
    """Return 1 - mean |weight x + offset - y|² / mean |y - mean(y)|², at most 1; x itself if weight is None.

    On the tokens that the map was fitted to it is biased upwards: with as many dimensions as tokens it is 1 for noise.
    It is 0 if the teacher is constant.

    >>> import torch
    >>> from xarch_kd.projectors import PairStatistics, explained_variance
    >>> student = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics = PairStatistics()
    >>> statistics.update(student, 2 * student)
    >>> round(explained_variance(statistics, 2 * torch.eye(4, dtype=torch.float64)), 3)
    1.0
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
    """Return the share of the teacher's variance in its leading `rank` components: the bound for that rank.

    >>> import torch
    >>> from xarch_kd.projectors import PairStatistics, ceiling
    >>> student = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics = PairStatistics()
    >>> statistics.update(student, 2 * student)
    >>> round(ceiling(statistics, rank=4), 3)
    1.0
    """
    values = torch.linalg.eigvalsh(statistics.moments().teacher).clamp(min=0)
    total = float(values.sum())
    return float(values[max(len(values) - rank, 0) :].sum()) / total if total > 0 else 0.0


def check_dims(projector: Projector, statistics: PairStatistics, features: int | None = None) -> None:
    """Raise UsageError unless the statistics fit a projector; `features` is by default its student dim."""
    allowed = (projector.student_dim if features is None else features, projector.teacher_dim)
    if statistics.dims is not None and statistics.dims != allowed:
        raise UsageError(
            "The statistics are of other dimensions than the projector.", found=statistics.dims, allowed=allowed
        )


def _leading(symmetric: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors [dim, rank] of the largest eigenvalues, in descending order."""
    return torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :rank]


def _with_offset(weight: Tensor, moments: SecondMoments, bias: bool) -> LinearMap:
    return LinearMap(weight, moments.teacher_mean - weight @ moments.student_mean if bias else None)


def _check_tokens(how: str, tokens: int, dimensions: int) -> None:
    enough = enough_tokens(dimensions)
    if tokens <= dimensions:
        raise UsageError(
            f"{how} of a projector is fitted to more tokens than it has dimensions.",
            found=f"{tokens} tokens",
            allowed=f">= {dimensions + 1}; {enough} are recommended",
            fix=f"calibrate on {enough} tokens, or init: random",
        )
    if tokens < enough:
        warnings.warn(
            f"{how} is fitted to {tokens} tokens in {dimensions} dimensions: it follows the tokens as much as the "
            f"layers. Calibrate on at least {enough}.",
            UserWarning,
            stacklevel=3,
        )
