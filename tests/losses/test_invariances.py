"""Invariances and blind spots of each objective: the ratio of its value after a change to that before.

`same` is a ratio of 1 up to rounding: the objective is invariant. `blind` is below a fifth: what student and teacher
newly share hides their difference. `seen` is well above 1. `kept` lies between: the change hides no more than its share
and shows little. `zero` is no loss at all, as for the teacher itself, rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
import torch
from torch import Tensor

from xarch_kd.losses import (
    FeatureStatistics,
    Standardizer,
    cka_loss,
    feature_loss,
    feature_normalizer,
    gram_loss,
    relation_loss,
)

TOKENS, WIDTH = 96, 24
Loss = Callable[[Tensor, Tensor], Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(teacher: Tensor) -> Standardizer:
    taken = FeatureStatistics()
    taken.update(teacher)
    return taken.standardizer()


def tokenwise(kind: str, standardize: bool = False) -> Loss:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        standardizer = statistics(teacher) if standardize else None
        normalizer = feature_normalizer(kind, teacher, standardizer=standardizer)
        return feature_loss(kind, student, teacher, normalizer=normalizer, standardizer=standardizer, epsilon=0.0)

    return loss


def related(function: Callable[..., Tensor], standardize: bool = False, shared_basis: bool = True) -> Loss:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        options = {"standardizer": statistics(teacher), "shared_basis": shared_basis} if standardize else {}
        return function(student, teacher, normalizer=TOKENS, **options)

    return loss


def relation(causal: bool) -> Loss:
    return lambda student, teacher: relation_loss(
        student.unsqueeze(2), teacher.unsqueeze(2), normalizer=TOKENS, heads=1, causal=causal
    )


def teacher() -> Tensor:
    """Features whose dimensions differ in size, as those of models do."""
    return normal(0, 1, TOKENS, WIDTH) * torch.linspace(0.4, 1.6, WIDTH, dtype=torch.float64)


def student() -> Tensor:
    return teacher() + 0.55 * normal(1, 1, TOKENS, WIDTH)


def rotation() -> Tensor:
    return torch.linalg.qr(normal(2, WIDTH, WIDTH)).Q


def massive(size: float, level: float) -> Tensor:
    """Values of one dimension, of 96 tokens."""
    return level + size * normal(5, 1, TOKENS)


def with_massive(features: Tensor, size: float, level: float) -> Tensor:
    return torch.cat([massive(size, level)[..., None], features[..., 1:]], -1)


CHANGES: Final[dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
    "scale": lambda s, t: (3 * s, t),
    "rotation": lambda s, t: (s @ rotation(), t),
    "shift": lambda s, t: (s + 1.5 * normal(3, WIDTH), t),
    "token scale": lambda s, t: (s * (0.7 * normal(4, 1, TOKENS, 1)).exp(), t),
    "massive constant": lambda s, t: (with_massive(s, 2.5, 60.0), with_massive(t, 2.5, 60.0)),
    "massive varying": lambda s, t: (with_massive(s, 60.0, 0.0), with_massive(t, 60.0, 0.0)),
    "rotated teacher": lambda s, t: (t @ rotation(), t),
}
LOSSES: Final[dict[str, Loss]] = {
    **{kind: tokenwise(kind) for kind in ("mse", "huber", "l2", "relative_mse", "normalised_mse", "cosine")},
    **{f"{kind} standardized": tokenwise(kind, True) for kind in ("huber", "normalised_mse", "cosine")},
    "gram": related(gram_loss),
    "gram standardized": related(gram_loss, True),
    "gram, teacher standardized": related(gram_loss, True, False),
    "cka": related(cka_loss),
    "cka standardized": related(cka_loss, True),
    "cka, teacher standardized": related(cka_loss, True, False),
    "relation": relation(False),
    "causal relation": relation(True),
}
# Columns in the order of CHANGES.
EXPECTED: Final = {
    "mse": "seen seen seen seen kept kept seen",
    "huber": "seen seen seen seen kept kept seen",
    "l2": "seen seen seen seen kept kept seen",
    "relative_mse": "seen seen seen seen blind blind seen",
    "normalised_mse": "seen seen seen seen blind blind seen",
    "cosine": "same seen seen same blind blind seen",
    "huber standardized": "seen seen seen seen kept kept seen",
    "normalised_mse standardized": "seen seen seen seen kept kept seen",
    "cosine standardized": "kept seen seen kept kept kept seen",
    "gram": "same same seen seen blind blind zero",
    "gram standardized": "kept seen seen seen kept kept kept",
    "gram, teacher standardized": "same same seen seen seen seen kept",
    "cka": "same same same seen kept blind zero",
    "cka standardized": "same seen same seen kept kept kept",
    "cka, teacher standardized": "same same same seen kept seen kept",
    "relation": "seen same seen seen blind blind zero",
    "causal relation": "seen same seen seen blind blind zero",
}


def word(ratio: float) -> str:
    if ratio < 1e-9:
        return "zero"
    if abs(ratio - 1) < 1e-9:
        return "same"
    return "blind" if ratio < 0.2 else "kept" if ratio < 1.2 else "seen"


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_sees(name: str) -> None:
    loss = LOSSES[name]
    before = float(loss(student(), teacher()))
    ratios = {change: float(loss(*apply(student(), teacher()))) / before for change, apply in CHANGES.items()}
    words = " ".join(word(ratio) for ratio in ratios.values())
    assert words == EXPECTED[name], {change: round(ratio, 4) for change, ratio in ratios.items()}


@pytest.mark.parametrize("name", [name for name in LOSSES if "teacher standardized" not in name])
def test_equal_features_have_no_loss(name: str) -> None:
    assert abs(float(LOSSES[name](teacher(), teacher()))) < 1e-12
