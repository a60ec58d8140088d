"""Optimizer, schedule and clipping of a stage as it trains; updates too small for bfloat16 are not lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from xarch_kd.errors import Interrupted, MappingFileError, NonFiniteLoss
from xarch_kd.job.train import train
from xarch_kd.objectives.next_token import NextTokenObjective
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import events_of, same, signal_after, student_of
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [event for event in events_of(run) if event["event"] == "step"]


def test_every_key_of_the_optimizer_reaches_the_steps_and_a_resumed_run_is_the_same(
    write_mapping: Write, tmp_path: Path
) -> None:
    optimizer = {
        "optim": "sgd",
        "args": {"momentum": 0.5},
        "lr": 0.1,
        "schedule": "wsd",
        "warmup": 0.25,
        "decay": 0.5,
        "min_lr": 0.05,
        "max_grad_norm": "off",
    }
    mapping = write_mapping({**MIXER_STAGE, "checkpoint_every": 1, "optimizer": optimizer})
    train(mapping, tmp_path / "whole")
    rates = [event["learning_rate"] for event in steps_of(tmp_path / "whole")]
    # Warm-up of 1 of 4 steps from min_lr, 1 step at lr, and half a cosine over 2 steps.
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.075])
    with signal_after(2), pytest.raises(Interrupted):
        train(mapping, tmp_path / "stopped")
    train(mapping, tmp_path / "stopped", resume=True)
    assert same(student_of(tmp_path / "stopped"), student_of(tmp_path / "whole"))


def test_gradients_are_clipped_unless_that_is_off(write_mapping: Write, tmp_path: Path) -> None:
    moved, norms = {}, {}
    for clipped in (1e-3, "off"):
        optimizer = {"optim": "sgd", "lr": 1.0, "schedule": "constant", "max_grad_norm": clipped}
        stage = {**MIXER_STAGE, "steps": 1, "optimizer": optimizer}
        train(write_mapping(stage, name=f"{clipped}.yaml"), tmp_path / str(clipped))
        norms[clipped] = steps_of(tmp_path / str(clipped))[0]["gradient_norm"]
        moved[clipped] = student_of(tmp_path / str(clipped))
    train(write_mapping({**stage, "optimizer": {"lr": 1e-30}}, name="still.yaml"), tmp_path / "still")
    still = student_of(tmp_path / "still")
    length = {
        clipped: float(torch.cat([(found[name] - still[name]).double().flatten() for name in still]).norm())
        for clipped, found in moved.items()
    }
    # SGD at rate 1 moves by the gradient; its norm is reported before clipping.
    assert norms["off"] == norms[1e-3] > 1e-2
    assert length["off"] == pytest.approx(norms["off"], rel=1e-3)
    assert length[1e-3] == pytest.approx(1e-3, rel=1e-2)


def test_without_clipping_a_gradient_that_is_not_finite_is_named(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameter is the first one that is not finite, so that finite gradients must not be spoiled before."""

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * float("nan")

    loss = NextTokenObjective.loss

    def spoiled(self: NextTokenObjective, student: torch.Tensor, *rest: Any) -> torch.Tensor:
        return loss(self, Spoiled.apply(student), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(NextTokenObjective, "loss", spoiled)
    stage = {**LOGIT_STAGE, "steps": 1, "train": ["head", "norms"], "optimizer": {"max_grad_norm": "off"}}
    with pytest.raises(NonFiniteLoss) as caught:
        train(write_mapping(stage), tmp_path / "run")
    assert "norm" in str(caught.value.found)


def test_updates_that_vanish_in_bfloat16_are_kept(write_mapping: Write, tmp_path: Path) -> None:
    """Training in place in bfloat16 would leave every weight as it is: the steps are below half of its spacing."""
    folder = tmp_path / "student"
    tiny_model("llama", num_hidden_layers=4, seed=5).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    before = load_file(folder / "model.safetensors")
    assert {value.dtype for value in before.values()} == {torch.bfloat16}
    optimizer = {"lr": 1e-6, "warmup": 0.0, "schedule": "constant"}
    stage = {**LOGIT_STAGE, "train": ["blocks"], "precision": "bfloat16", "steps": 5, "optimizer": optimizer}
    run = train(write_mapping(stage, student={"model": str(folder)}), tmp_path / "run")
    after = student_of(run.path)
    weights = [name for name in after if "proj.weight" in name]
    assert weights
    for name in weights:
        started, ended = before[name].float(), after[name]
        assert ended.dtype == torch.float32
        large = started.abs() > 2**-9
        # bfloat16 has 8 bits: its spacing at x is at least |x| / 256, and AdamW moves by at most about lr per step.
        assert torch.equal(ended.to(torch.bfloat16)[large], before[name][large])
        moved = (ended - started).abs()[large]
        assert float((moved > 1e-7).float().mean()) > 0.9
        step_by_step = before[name].clone()
        for _ in range(5):
            step_by_step -= torch.full_like(step_by_step, 1e-6)
        assert torch.equal(step_by_step[large], before[name][large])


def test_an_unknown_optimizer_is_refused_with_a_suggestion(write_mapping: Write) -> None:
    with pytest.raises(MappingFileError) as caught:
        make_plan(write_mapping({**MIXER_STAGE, "optimizer": {"optim": "adafacter"}}))
    assert "stages[0].optimizer.optim: 'adafacter' is not" in str(caught.value)
    assert "Did you mean 'adafactor'?" in str(caught.value)


def test_arguments_of_another_kind_are_refused(write_mapping: Write) -> None:
    for arguments, message in (
        (3, "stages[0].optimizer.args: must be a mapping of names to values, found the number 3"),
        ({"momentum": {"a": 1}}, "momentum is neither a number, text, true, false nor a list of numbers"),
    ):
        with pytest.raises(MappingFileError) as caught:
            make_plan(write_mapping({**MIXER_STAGE, "optimizer": {"optim": "sgd", "args": arguments}}))
        assert message in str(caught.value)
