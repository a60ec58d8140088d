"""Diagnoses of projectors that are good, narrow, useless, ill-conditioned or too expressive by construction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.projectors import (
    PairStatistics,
    Projector,
    build_projector,
    diagnose,
    explained_alone,
    explained_variance,
    initialize,
)

STUDENT, TEACHER, TOKENS = 8, 12, 400


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(x: Tensor, y: Tensor) -> PairStatistics:
    statistics = PairStatistics()
    statistics.update(x, y)
    return statistics


def built(kind: str = "linear", **options: Any) -> Projector:
    projector = build_projector(kind, STUDENT, TEACHER, bias=True, **options)
    assert projector is not None
    return projector


def layers(seed: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Return (student, teacher); the teacher is a fixed map of the student plus noise."""
    x = normal(tokens, STUDENT, seed=seed)
    return x, x @ normal(STUDENT, TEACHER, seed=99) + 0.1 * normal(tokens, TEACHER, seed=seed + 50)


def trained_on(projector: Projector, x: Tensor, y: Tensor) -> PairStatistics:
    with torch.no_grad():
        return of(projector.split(x).features, y)


@pytest.mark.parametrize(
    ("kind", "options"), [("linear", {}), ("low_rank", {"rank": 5}), ("mlp", {}), ("orthogonal", {})]
)
def test_a_student_that_learned_is_fine(kind: str, options: dict[str, int]) -> None:
    projector = built(kind, **options)
    x, y = layers(1)
    before = normal(TOKENS, STUDENT, seed=5)
    alone = explained_alone(projector, of(before, y), of(normal(TOKENS, STUDENT, seed=6), layers(2)[1]))
    # Noise explains nothing on held-out tokens, and about dim / tokens on the tokens of the fit.
    assert alone < 0.005
    initialize(projector, of(x, y))
    found = diagnose(projector, trained_on(projector, *layers(2)), alone=alone)
    assert found.warnings == () and found.verdict.startswith("ok: ") and found.share is not None
    assert found.kind == kind and found.rank == found.possible_rank == projector.rank
    with torch.no_grad():
        x, y = layers(2)
        direct = 1 - float((projector(x) - y).square().sum() / (y - y.mean(0)).square().sum())
    assert found.explained == pytest.approx(direct, abs=1e-5)
    assert found.explained < found.ceiling <= 1
    values = torch.linalg.svdvals(projector.matrix())[: projector.rank]
    assert found.condition == pytest.approx(float(values[0] / values[-1]), rel=1e-3)


def test_a_projector_of_rank_one_is_narrow() -> None:
    projector = built()
    x, y = layers(1)
    projector.set_linear_map(torch.outer(normal(TEACHER, seed=3), normal(STUDENT, seed=4)))
    found = diagnose(projector, trained_on(projector, x, y))
    assert found.rank == 1 and found.possible_rank == STUDENT and found.condition > 1e6
    assert [warning.split(":")[0] for warning in found.warnings][-1] == "narrow"
    assert f"passes 1 of {STUDENT} directions" in found.verdict
    values = torch.linalg.eigvalsh(torch.cov(y.T))
    assert found.ceiling == pytest.approx(float(values[-1] / values.sum()), rel=1e-4)


def test_a_projector_through_which_nothing_matches_is_useless() -> None:
    projector = built()
    x, y = normal(TOKENS, STUDENT, seed=1), normal(TOKENS, TEACHER, seed=2)
    initialize(projector, of(x, y))
    found = diagnose(projector, trained_on(projector, normal(TOKENS, STUDENT, seed=3), y), alone=0.5)
    assert len(found.warnings) == 1 and found.warnings[0].startswith("useless: ")
    projector.set_linear_map(torch.zeros(TEACHER, STUDENT))
    found = diagnose(projector, of(x, y))
    assert found.rank == 0 and math.isinf(found.condition) and found.ceiling == 0 and len(found.warnings) == 2


def test_an_ill_conditioned_projector_is_named() -> None:
    projector = built()
    x, y = layers(1)
    initialize(projector, of(x, y))
    left, values, right = torch.linalg.svd(projector.matrix(), full_matrices=False)
    values[-1] = values[0] / 3e4
    projector.set_linear_map(left * values @ right)
    found = diagnose(projector, of(x, y))
    assert found.condition == pytest.approx(3e4, rel=0.05) and found.rank == STUDENT - 1
    assert len(found.warnings) == 1 and found.warnings[0].startswith("ill-conditioned: ")


def test_a_projector_that_does_the_students_work_is_named() -> None:
    projector = built()
    first, second = layers(1), layers(2)
    alone = explained_alone(projector, of(*first), of(*second))
    initialize(projector, of(*first))
    # The student stayed as it was.
    found = diagnose(projector, trained_on(projector, *second), alone=alone)
    assert alone == pytest.approx(found.explained, abs=1e-5) and found.share == pytest.approx(1, abs=1e-5)
    assert len(found.warnings) == 1 and "does the student's work: alone" in found.verdict
    assert "100% of the match" in found.verdict
    assert diagnose(projector, of(*second), alone=0.85 * found.explained).warnings == ()
    worse = diagnose(projector, of(*second), alone=-2.0)
    assert worse.warnings == () and worse.share == 0


def test_a_wide_projector_explains_noise_of_the_tokens_it_was_fitted_to() -> None:
    """Independent features give about dim / tokens in sample, and at most 0 out of sample."""
    wide = build_projector("linear", 100, 4, bias=True)
    assert wide is not None
    fitted, held_out = (of(normal(200, 100, seed=seed), normal(200, 4, seed=seed + 9)) for seed in (1, 2))
    assert explained_alone(wide, fitted, fitted) == pytest.approx(0.5, abs=0.1)
    assert explained_alone(wide, fitted, held_out) < 0


def test_an_identity_is_diagnosed_too() -> None:
    identity = build_projector("identity", 5, 5)
    assert identity is not None
    y = normal(TOKENS, 5, seed=1)
    x = y + 0.5 * normal(TOKENS, 5, seed=2)
    found = diagnose(identity, of(x, y), alone=explained_alone(identity, of(x, y), of(y * 0.5, y)))
    assert (found.rank, found.condition, found.ceiling) == (5, 1, pytest.approx(1))
    assert found.explained == explained_variance(of(x, y), None) == pytest.approx(0.75, abs=0.05)
    # Half of each feature is left: a quarter of the variance is missing.
    assert found.alone == pytest.approx(0.75, abs=0.01)


def test_statistics_of_other_features_are_refused() -> None:
    projector = built("low_rank", rank=5)
    x, y = layers(1)
    with pytest.raises(UsageError, match="other dimensions"):
        diagnose(projector, of(x, y))
    with pytest.raises(UsageError, match="other dimensions"):
        explained_alone(projector, of(x, y), of(y, x))
