"""Stages of epochs: their number of steps follows from the text, and everything else from that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from xarch_kd.errors import Interrupted, MappingFileError, UsageError
from xarch_kd.job.evaluate import evaluate
from xarch_kd.job.train import train
from xarch_kd.planning.render import plan_as_dict
from xarch_kd.planning.resolve import make_plan, plan_of_run, with_steps
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import events_of, same, signal_after, student_of

FEW: dict[str, Any] = {name: value for name, value in MIXER_STAGE.items() if name not in ("steps", "batches")}


@pytest.mark.parametrize(
    ("stage", "rows", "steps"),
    [
        ({"epochs": 2}, 10, 10),
        ({"epochs": 1}, 9, 5),
        ({"epochs": 0.5}, 10, 3),
        ({"epochs": 3, "gradient_accumulation": 4}, 10, 4),
        ({"epochs": 2, "batch_size": 5}, 10, 4),
        ({"epochs": 2, "batches": 3}, 10, 6),
        ({"epochs": 2, "batches": 30}, 10, 10),
        ({"epochs": 0.01}, 10, 1),
        # 0.1 x 3 / 0.3 of floating point is no fourth step.
        ({"epochs": 0.3}, 20, 3),
    ],
)
def test_an_epoch_is_one_pass_over_the_rows_or_the_batches(
    write_mapping: Write, stage: dict[str, Any], rows: int, steps: int
) -> None:
    plan = make_plan(write_mapping({**FEW, **stage}))
    assert plan.stages[0].is_open
    resolved = with_steps(plan, rows=rows)
    (found,) = resolved.stages
    assert found.steps == steps
    assert found.tokens == steps * found.tokens_per_step
    assert resolved.mapping == plan.mapping
    # As if the steps had been written.
    written = {key: value for key, value in stage.items() if key != "epochs"}
    expected = make_plan(write_mapping({**FEW, **written, "steps": steps}), rates=plan.rates).stages[0]
    assert (found.distinct_batches, found.cache_bytes) == (expected.distinct_batches, expected.cache_bytes)
    assert found.seconds == pytest.approx(expected.seconds)


def test_a_run_of_an_epoch_is_the_run_of_its_steps_and_resumes(write_mapping: Write, tmp_path: Path) -> None:
    text = tmp_path / "few.txt"
    text.write_text("".join(f"{number}. A short text about the number {number}.\n\n" for number in range(10)))
    data = {"files": [str(text)], "sequence_length": 32, "batch_size": 2}
    mapping = write_mapping({**FEW, "epochs": 1}, data=data, name="epochs.yaml")
    run = train(mapping, tmp_path / "epochs")
    steps = run.stages["mixers"].steps
    assert steps == run.stages["mixers"].step > 2
    train(write_mapping({**FEW, "steps": steps}, data=data), tmp_path / "steps")
    assert same(student_of(tmp_path / "epochs"), student_of(tmp_path / "steps"))
    with signal_after(1), pytest.raises(Interrupted):
        train(mapping, tmp_path / "stopped")
    train(mapping, tmp_path / "stopped", resume=True)
    assert same(student_of(tmp_path / "stopped"), student_of(tmp_path / "steps"))
    assert train(mapping, tmp_path / "stopped").was_finished
    # Evaluating plans the mapping file again, which does not have the number of steps.
    evaluate(tmp_path / "stopped", suites=["likelihood"], tokens=64, console=Console(quiet=True))
    card = (run.student / "README.md").read_text()
    assert f"`mixers`: {steps} steps, {steps * 64} tokens," in card
    assert f"`mixers`: {steps} steps, {steps * 64} tokens," in (tmp_path / "stopped/student/README.md").read_text()
    assert {event["steps"] for event in events_of(tmp_path / "epochs") if event["event"] == "step"} == {steps}


def test_a_plan_shows_epochs_and_that_their_cost_depends_on_the_text(write_mapping: Write) -> None:
    plan = make_plan(write_mapping({**FEW, "epochs": 2}, LOGIT_STAGE))
    console = Console(width=250)
    with console.capture() as capture:
        console.print(plan)
    shown = capture.get()
    assert "2 epochs" in shown and "32 per step" in shown
    # Tokens and time of all stages together, and the warning.
    assert shown.count("depends on the text") == 3
    assert any("its number of steps (epochs: 2) depends on the text" in warning for warning in plan.warnings)
    stage = json.loads(json.dumps(plan_as_dict(plan)))["stages"][0]["stage"]
    assert (stage["steps"], stage["epochs"]) == (None, 2.0)
    with pytest.raises(UsageError, match="the number of steps of stage 'mixers' depends on the text"):
        _ = plan.stages[0].steps


def test_a_finished_run_is_measured_without_the_packages_of_its_training(
    write_mapping: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {**MIXER_STAGE, "optimizer": {"optim": "stable_adamw"}}
    mapping = write_mapping(stage, {**FEW, "name": "few", "epochs": 2}, tracking=["wandb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MappingFileError) as caught:
        make_plan(mapping)
    assert "tracking[0]: needs the package 'wandb': pip install wandb" in str(caught.value)
    assert "stages[0].optimizer.optim: 'stable_adamw' needs the package" in str(caught.value)
    assert plan_of_run(mapping).stages[1].is_open


def test_what_shows_only_with_the_text_is_refused_before_training(write_mapping: Write) -> None:
    plan = make_plan(write_mapping({**FEW, "epochs": 2, "cache": {"where": "memory", "limit_gib": 0.001}}))
    with pytest.raises(MappingFileError) as caught:
        with_steps(plan, rows=1_000_000)
    assert "stages[0].cache: the teacher's features need" in str(caught.value)
