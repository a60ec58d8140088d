"""Moving average of the weights: its value by hand, evaluated, kept at the end, exact under resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from xarch_kd.errors import CheckpointError, Interrupted
from xarch_kd.job.train import train
from xarch_kd.testing.mapping import MIXER_STAGE, Write
from xarch_kd.testing.runs import same, signal_after, student_of
from xarch_kd.training import trainer
from xarch_kd.training.ema import WeightAverage, decay_at

STAGE: dict[str, Any] = {
    **MIXER_STAGE,
    "steps": 3,
    "checkpoint_every": 1,
    "optimizer": {"lr": 1e-2, "warmup": 0.0, "schedule": "constant"},
    "evaluation": {"every": 1, "batches": 1},
}
AVERAGED = {**STAGE, "ema": {"decay": 0.3}}


def test_a_stage_ends_with_the_average_of_its_steps_and_evaluates_it(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[dict[str, Tensor]] = []

    def recorded(student: nn.Module) -> None:
        weights.append({name: value.detach().double() for name, value in student.named_parameters()})

    class Recording(WeightAverage):
        def __init__(self, student: nn.Module, decay: float) -> None:
            super().__init__(student, decay)
            self.student = student
            recorded(student)

        def update(self, step: int) -> None:
            super().update(step)
            recorded(self.student)

    monkeypatch.setattr(trainer, "WeightAverage", Recording)
    still = {**STAGE, "name": "still", "steps": 1, "optimizer": {"lr": 1e-30}}
    run = train(write_mapping(AVERAGED, still), tmp_path / "run")
    assert len(weights) == 4
    expected = dict(weights[0])
    for step in (1, 2, 3):
        decay = min(0.3, (1 + step) / (10 + step))
        for name, value in weights[step].items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    found = student_of(run.path)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-7)
    moved = {name for name in expected if not torch.equal(found[name].double(), weights[3][name])}
    assert moved and all(".mamba." in name for name in moved)
    # The next stage begins with the average, which is what the last evaluation measured.
    assert run.stages["still"].evaluations[1] == pytest.approx(run.stages["mixers"].evaluations[3], rel=1e-6)


def test_a_resumed_run_has_the_same_average(write_mapping: Write, tmp_path: Path) -> None:
    mapping = write_mapping(AVERAGED)
    train(mapping, tmp_path / "whole")
    with signal_after(2), pytest.raises(Interrupted):
        train(mapping, tmp_path / "stopped")
    train(mapping, tmp_path / "stopped", resume=True)
    assert same(student_of(tmp_path / "stopped"), student_of(tmp_path / "whole"))


def test_weights_are_the_trained_ones_again_after_the_average_was_applied() -> None:
    student = nn.Linear(2, 2)
    average = WeightAverage(student, 0.9)
    started = student.weight.detach().clone()
    with torch.no_grad():
        student.weight.add_(1.0)
    storage, trained = student.weight.data_ptr(), student.weight.detach().clone()
    with average.applied():
        assert torch.equal(student.weight, started)
    assert torch.equal(student.weight, trained) and student.weight.data_ptr() == storage


def test_a_bfloat16_student_has_a_float32_average_that_small_changes_reach() -> None:
    student = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        student.weight.fill_(1.0)
    average = WeightAverage(student, 0.999)
    with torch.no_grad():
        student.weight.fill_(1.0078125)  # the next number in bfloat16
    average.update(step=10**6)
    average_now = average._average["weight"]
    assert average_now.dtype == torch.float32
    assert float(average_now) == pytest.approx(1.0 + 0.001 * 0.0078125, rel=1e-7)


def test_the_decay_of_the_first_steps_is_lower() -> None:
    assert [decay_at(0.999, step) for step in (1, 8, 10**6)] == [2 / 11, 0.5, 0.999]


def test_an_average_of_another_stage_is_refused(tmp_path: Path) -> None:
    WeightAverage(nn.Linear(2, 2), 0.9).save(tmp_path)
    assert set(load_file(tmp_path / "ema.safetensors")) == {"weight", "bias"}
    with pytest.raises(CheckpointError, match=r"1 names differ|does not hold"):
        WeightAverage(nn.Linear(2, 2, bias=False), 0.9).load(tmp_path)
    (tmp_path / "ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors cannot be read"):
        WeightAverage(nn.Linear(2, 2), 0.9).load(tmp_path)
