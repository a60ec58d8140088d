"""Learning-rate schedules of a stage at each step, from their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import get_scheduler

from xarch_kd.mapping_file.training import Optimizer
from xarch_kd.training.arguments import schedule_of

STEPS, LR = 20, 0.5


def rates(settings: Optimizer) -> list[float]:
    """Return the rate at each of STEPS steps, as the Trainer sets it."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([{"params": [parameter]}, {"params": [], "lr": 2 * LR}], lr=settings.lr)
    name, options = schedule_of(settings, STEPS)
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=round(settings.warmup * STEPS),
        num_training_steps=STEPS,
        scheduler_specific_kwargs=options,
    )
    found = []
    for _ in range(STEPS):
        first, second = scheduler.get_last_lr()
        # Other rates keep their ratio to `lr`.
        assert second == pytest.approx(2 * first)
        found.append(first)
        optimizer.step()
        scheduler.step()
    return found


def falling(step: int, *, lowest: float, shape: str) -> float:
    share = (step - 4) / (STEPS - 4)
    height = 0.5 * (1 + math.cos(math.pi * share)) if shape == "cosine" else 1 - share
    return lowest + (LR - lowest) * height


@pytest.mark.parametrize("lowest", [0.0, 0.1])
@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_cosine_and_linear_end_at_min_lr(shape: Any, lowest: float) -> None:
    found = rates(Optimizer(lr=LR, schedule=shape, warmup=0.2, min_lr=lowest))
    expected = [LR * step / 4 if step < 4 else falling(step, lowest=lowest, shape=shape) for step in range(STEPS)]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lowest", [0.0, 0.1])
def test_wsd_rises_stays_and_falls(lowest: float) -> None:
    found = rates(Optimizer(lr=LR, schedule="wsd", warmup=0.2, decay=0.25, min_lr=lowest))
    rise = [lowest + (LR - lowest) * step / 4 for step in range(4)]
    fall = [lowest + (LR - lowest) * 0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert found == pytest.approx([*rise, *[LR] * 11, *fall], rel=1e-6)


def test_constant_schedules() -> None:
    assert rates(Optimizer(lr=LR, schedule="constant")) == [LR] * STEPS
    warm = rates(Optimizer(lr=LR, schedule="constant_with_warmup", warmup=0.2))
    assert warm == pytest.approx([0, 0.125, 0.25, 0.375, *[LR] * 16])


def test_schedules_without_min_lr_are_those_of_transformers_by_name() -> None:
    for name in ("cosine", "linear", "constant"):
        assert schedule_of(Optimizer(schedule=name), STEPS) == (name, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "constant", "min_lr": 1e-5}, "'constant' has no end"),
        ({"lr": 1e-3, "min_lr": 1e-3}, "min_lr must be below lr, found min_lr 0.001 and lr 0.001"),
        ({"schedule": "constant", "warmup": 0.1}, "Use schedule: constant_with_warmup, or warmup: 0"),
        ({"schedule": "cosine", "decay": 0.1}, "decay is the last part of schedule: wsd"),
        ({"schedule": "wsd", "warmup": 0.6, "decay": 0.5}, "together at most 1, found 1.1"),
    ],
)
def test_keys_that_a_schedule_would_not_use_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Optimizer(**settings)
    assert words in str(caught.value)
