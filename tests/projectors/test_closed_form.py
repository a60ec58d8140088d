"""Projectors in closed form: against least squares and explicit decompositions in float64, and by recovery.

Tolerances are those of float64 products over some hundred tokens unless a comment says otherwise.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.projectors import (
    PairStatistics,
    build_projector,
    ceiling,
    explained_variance,
    initialize,
    pca,
    procrustes,
    resolve_init,
    ridge,
)

TOKENS = 60
exactly = partial(torch.testing.assert_close, rtol=0.0, atol=1e-10)


def pair(student: int = 5, teacher: int = 7, tokens: int = TOKENS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features with offsets, a student that varies unequally, and a teacher that is partly a map of it."""
    generator = torch.Generator().manual_seed(seed)
    x, y, mix = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, student), (tokens, teacher), (student, teacher))
    )
    x = x * torch.linspace(0.5, 2, student, dtype=torch.float64) + 3
    return x, y + x @ mix - 2


def of(x: Tensor, y: Tensor) -> PairStatistics:
    statistics = PairStatistics()
    statistics.update(x, y)
    return statistics


def centre(features: Tensor) -> Tensor:
    return features - features.mean(0)


def rotation(size: int, seed: int = 0) -> Tensor:
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draw).Q


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 2])
def test_ridge_is_the_least_squares_solution(bias: bool, rank: int | None) -> None:
    """Ridge equals least squares with √λ extra rows; at lower rank, its fit projected onto the leading directions."""
    x, y = pair()
    own, target = (centre(x), centre(y)) if bias else (x, y)
    strength = 0.1 * own.square().sum() / own.numel() * TOKENS
    rows = torch.cat((own, strength.sqrt() * torch.eye(5, dtype=torch.float64)))
    aims = torch.cat((target, torch.zeros(5, 7, dtype=torch.float64)))
    expected = torch.linalg.lstsq(rows, aims).solution
    if rank is not None:
        leading = torch.linalg.svd(rows @ expected, full_matrices=False).Vh[:rank]
        expected = expected @ leading.T @ leading
    weight, offset = ridge(of(x, y), bias=bias, rank=rank, penalty=0.1)
    exactly(weight, expected.T)
    if not bias:
        assert offset is None
        return
    assert offset is not None
    exactly(offset, y.mean(0) - x.mean(0) @ expected)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("dims", [(5, 7), (7, 5)])
def test_procrustes_is_the_explicit_decomposition(dims: tuple[int, int], rank: int | None) -> None:
    x, y = pair(*dims)
    left, values, right = torch.linalg.svd(centre(y).T @ centre(x), full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    isometry = left @ right
    statistics = of(x, y)
    exactly(procrustes(statistics, rank=rank, scaled=False).weight, isometry)
    weight, offset = procrustes(statistics, rank=rank)
    # The best factor of a fixed map, by least squares.
    projected = (centre(x) @ isometry.T).reshape(-1, 1)
    factor = torch.linalg.lstsq(projected, centre(y).reshape(-1, 1)).solution.item()
    exactly(weight, factor * isometry)
    assert offset is not None
    exactly(offset, y.mean(0) - x.mean(0) @ weight.T)


def test_a_rotated_student_is_rotated_back() -> None:
    x, _ = pair(6, 6)
    turn = rotation(6)
    teacher = 0.25 * x @ turn.T + 4
    weight, offset = procrustes(of(x, teacher))
    exactly(weight, 0.25 * turn)
    assert offset is not None
    exactly(offset, torch.full((6,), 4, dtype=torch.float64))
    for kind, how in (("orthogonal", "procrustes"), ("orthogonal", "pca"), ("linear", "procrustes")):
        projector = build_projector(kind, 6, 6, bias=True)
        assert projector is not None
        # pca has the student's rotation too at full rank.
        target = teacher if kind == "linear" else x @ turn.T + 4
        initialize(projector, of(x, target), how)
        torch.testing.assert_close(projector(x.float()), target.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_pca_reaches_what_no_map_of_its_rank_exceeds(bias: bool) -> None:
    x, y = pair(3, 7)
    target = centre(y) if bias else y
    directions = torch.linalg.svd(target, full_matrices=False).Vh[:3]
    weight, offset = pca(of(x, y), bias=bias)
    exactly(weight.T @ weight, torch.eye(3, dtype=torch.float64))
    exactly(weight @ weight.T, directions.T @ directions)
    # Within the directions, the rotation nearest to the student: no other has a larger product with the teacher.
    own = centre(x) if bias else x
    products = [(own @ turn @ weight.T * target).sum() for turn in (rotation(3, seed) for seed in range(20))]
    assert (own @ weight.T * target).sum() > max(products)
    assert (offset is not None) == bias
    scores = centre(y) @ directions.T
    share = (scores.square().sum() / centre(y).square().sum()).item()
    if bias:
        assert ceiling(of(x, y), 3) == pytest.approx(share, abs=1e-12)
        best = explained_variance(of(scores, y), directions.T, y.mean(0))
        assert best == pytest.approx(share, abs=1e-12)


def test_explained_variance_is_the_direct_formula() -> None:
    x, y = pair()
    weight, offset = pair(5, 7, tokens=7, seed=3)[0], y[0]
    direct = 1 - (x @ weight.T + offset - y).square().sum() / centre(y).square().sum()
    assert explained_variance(of(x, y), weight, offset) == pytest.approx(direct.item(), rel=1e-10)
    same = 1 - (y + 0.5 - y).square().sum() / centre(y).square().sum()
    assert explained_variance(of(y + 0.5, y), None) == pytest.approx(same.item(), rel=1e-10)
    assert explained_variance(of(x, torch.ones_like(y)), weight) == 0


def test_merged_parts_are_the_whole_and_masked_tokens_are_left_out() -> None:
    x, y = pair()
    x, y = x + 1e4, y - 1e4
    whole, parts, rest, empty = of(x, y), of(x[:17], y[:17]), PairStatistics(), PairStatistics()
    mask = torch.rand(4, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    mask.view(-1)[:37] = True
    padded_x, padded_y = torch.full((80, 5), torch.nan).double(), torch.full((80, 7), torch.nan).double()
    counted = mask.view(-1).nonzero()[:43, 0]
    mask.view(-1)[counted[-1] + 1 :] = False
    padded_x[counted], padded_y[counted] = x[17:], y[17:]
    rest.update(padded_x.view(4, 20, 5), padded_y.view(4, 20, 7), mask=mask)
    rest.update(x[:0], y[:0])
    parts.merge(rest)
    parts.merge(empty)
    empty.merge(parts)
    assert whole.tokens == parts.tokens == empty.tokens == TOKENS and whole.dims == (5, 7)
    for centered in (True, False):
        for merged in (parts, empty, PairStatistics.from_state(parts.state())):
            for one, other in zip(whole.moments(centered=centered), merged.moments(centered=centered), strict=True):
                # Products of about 1e8 in the sums about 0; about the means the offset costs 4 of 16 digits.
                torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-9)
    for one, dense in zip(
        whole.moments(),
        (centre(x).T @ centre(x) / TOKENS, centre(x).T @ centre(y) / TOKENS, centre(y).T @ centre(y) / TOKENS),
        strict=False,
    ):
        torch.testing.assert_close(one, dense, rtol=0, atol=1e-9)
    torch.testing.assert_close(whole.moments(centered=False).cross, x.T @ y / TOKENS, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kind", "hidden", "rank"),
    [("linear", None, None), ("low_rank", None, 2), ("mlp", None, None), ("mlp", 31, None), ("mlp", 5, 2)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_projector_starts_as_the_ridge_of_its_rank(
    kind: str, hidden: int | None, rank: int | None, bias: bool
) -> None:
    x, y = pair()
    projector = build_projector(kind, 5, 7, bias=bias, hidden=hidden, rank=rank if kind == "low_rank" else None)
    assert projector is not None
    fitted = initialize(projector, of(x, y))
    assert fitted is not None
    torch.testing.assert_close(fitted, ridge(of(x, y), bias=bias, rank=rank))
    dense = x @ fitted.weight.T + (0 if fitted.offset is None else fitted.offset)
    torch.testing.assert_close(projector(x.float()), dense.float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(projector.matrix(), fitted.weight.float(), rtol=1e-5, atol=1e-5)


def test_what_a_start_leaves_alone() -> None:
    x, y = pair(6, 6)
    linear, identity = build_projector("linear", 6, 6), build_projector("identity", 6, 6)
    assert linear is not None and identity is not None
    assert initialize(linear, of(x, y), "random") is None and torch.equal(linear.matrix(), torch.eye(6))
    assert initialize(identity, of(x, y)) is None
    assert resolve_init("auto", "orthogonal") == "procrustes" and resolve_init("auto", "mlp") == "ridge"


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("orthogonal", "ridge", "not orthogonal"),
        ("linear", "rigde", "Did you mean 'ridge'"),
        ("identity", "pca", "nothing to fit"),
    ],
)
def test_forms_that_do_not_fit_are_refused(kind: str, how: str, message: str) -> None:
    projector = build_projector(kind, 6, 6)
    assert projector is not None
    with pytest.raises(UsageError, match=message):
        initialize(projector, of(*pair(6, 6)), how)


def test_fewer_tokens_than_dimensions() -> None:
    linear, thin = build_projector("linear", 6, 9, bias=True), build_projector("low_rank", 6, 9, rank=2)
    assert linear is not None and thin is not None
    few = of(*pair(6, 9, tokens=6))
    for how in ("ridge", "procrustes"):
        with pytest.raises(UsageError, match=r"6 tokens\n.*>= 7; 24 are recommended"):
            initialize(linear, few, how)
    for tokens in (7, 23):
        with pytest.warns(UserWarning, match=f"{tokens} tokens in 6 dimensions.*at least 24"):
            initialize(linear, of(*pair(6, 9, tokens=tokens)))
    initialize(linear, of(*pair(6, 9, tokens=24)))
    # Two components need no more tokens for a wider student.
    initialize(thin, of(*pair(6, 9, tokens=8)), "pca")
    with pytest.raises(UsageError, match=">= 3; 8 are recommended"):
        initialize(thin, of(*pair(6, 9, tokens=2)), "pca")


def test_bad_input() -> None:
    x, y = pair()
    statistics = of(x, y)
    projector = build_projector("linear", 7, 5)
    assert projector is not None
    with pytest.raises(UsageError, match="other dimensions"):
        initialize(projector, statistics)
    with pytest.raises(UsageError, match="teacher does not fit"):
        statistics.update(x, y[:-1])
    with pytest.raises(UsageError, match="dims of the first call"):
        statistics.update(y, x)
    with pytest.raises(UsageError, match="of no tokens"):
        ridge(PairStatistics())
    with pytest.raises(UsageError, match="needs a positive penalty"):
        ridge(statistics, penalty=0.0)
    y[3, 2] = torch.inf
    with pytest.raises(NonFiniteLoss, match="of the teacher are not finite"):
        statistics.update(x, y)
