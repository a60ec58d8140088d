"""Held-out evaluation while a stage trains: right figures, no influence on training, the best kept, early stopping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from xarch_kd.errors import Interrupted, MappingFileError
from xarch_kd.job.held_out import held_out_batches, held_out_rows
from xarch_kd.job.models import load_run_tokenizer
from xarch_kd.job.run import Run
from xarch_kd.job.texts import run_text
from xarch_kd.job.train import train
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.report import Reporter
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import events_of, same, signal_after, student_of

# A rate at which the loss falls, and rises again after its first steps.
STEEP: dict[str, Any] = {
    **MIXER_STAGE,
    "steps": 7,
    "optimizer": {"lr": 0.03, "warmup": 0.0, "schedule": "constant"},
    "checkpoint_every": 3,
}
STOPPING: dict[str, Any] = {**STEEP, "evaluation": {"every": 1, "batches": 2, "keep": "best", "patience": 2}}


def evaluations_of(run: Path) -> dict[int, dict[str, Any]]:
    """Return the evaluations of a run of one stage by step; those of a resumed run replace earlier ones."""
    return {event["step"]: event for event in events_of(run) if event["event"] == "evaluation"}


@pytest.mark.parametrize("stage", [MIXER_STAGE, LOGIT_STAGE], ids=["inputs: teacher", "inputs: student"])
def test_training_does_not_notice_that_it_is_evaluated(
    write_mapping: Write, tmp_path: Path, stage: dict[str, Any]
) -> None:
    stage = {**stage, "steps": 3, "gradient_accumulation": 2}
    train(write_mapping(stage, name="without.yaml"), tmp_path / "without")
    evaluated = {**stage, "evaluation": {"every": 2, "batches": 3}}
    train(write_mapping(evaluated, name="with.yaml"), tmp_path / "with")
    assert same(student_of(tmp_path / "with"), student_of(tmp_path / "without"))
    assert list(evaluations_of(tmp_path / "with")) == [2, 3]


def test_the_figures_are_those_of_the_saved_student_on_held_out_rows(
    write_mapping: Write, tmp_path: Path, teacher_folder: Path
) -> None:
    mapping = write_mapping({**LOGIT_STAGE, "evaluation": {"every": 3, "batches": 3}})
    run = train(mapping, tmp_path / "run")
    plan = make_plan(mapping)
    rows = held_out_rows(run_text(plan, load_run_tokenizer(plan), Reporter.silent()), plan)
    batches = list(held_out_batches(plan.stages[0], rows))
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 16)] * 3
    ids = torch.cat([batch.input_ids for batch in batches])
    with torch.no_grad():
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits[:, :-1].double().log_softmax(-1)
            for folder in (run.student, teacher_folder)
        )
    nll = -float(student.gather(-1, ids[:, 1:, None]).mean())
    divergence = float((teacher.exp() * (teacher - student)).sum(-1).mean())
    found = run.stages["logits"].held_out
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
    assert found["loss"] == found["tokens"] == pytest.approx(divergence + 0.1 * nll, rel=1e-4)
    assert run.metrics["logits/held-out/nll"] == found["nll"]
    assert evaluations_of(tmp_path / "run")[3]["tokens"] == ids[:, 1:].numel()


def test_relative_mse_is_divided_by_the_teacher_over_all_held_out_batches(write_mapping: Write, tmp_path: Path) -> None:
    found = {}
    for batch_size in (2, 6):
        stage = {**MIXER_STAGE, "steps": 1, "batch_size": batch_size, "optimizer": {"lr": 1e-30}}
        stage["evaluation"] = {"every": 1, "batches": 6 // batch_size}
        train(write_mapping(stage, name=f"{batch_size}.yaml"), tmp_path / str(batch_size))
        found[batch_size] = evaluations_of(tmp_path / str(batch_size))[1]
    assert found[2]["loss"] == pytest.approx(found[6]["loss"], rel=1e-5)
    assert found[2]["nll"] == pytest.approx(found[6]["nll"], rel=1e-6)


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """Folder of the run that was not stopped, once it was made."""
    return {}


@pytest.fixture
def whole(write_mapping: Write, tmp_path_factory: pytest.TempPathFactory, made: dict[str, Path]) -> Run:
    """The run of `STOPPING` that was not stopped, made once."""
    if "run" not in made:
        folder = tmp_path_factory.mktemp("whole") / "run"
        train(write_mapping(STOPPING), folder)
        made["run"] = folder
    return Run(made["run"])


def test_the_best_weights_are_those_of_a_run_that_ends_there(write_mapping: Write, tmp_path: Path, whole: Run) -> None:
    stage = whole.stages["mixers"]
    best = min(stage.evaluations, key=lambda step: stage.evaluations[step]["loss"])
    assert 1 < best < stage.step, "the loss has to fall and rise for this test"
    assert stage.weights_of_step == best
    assert stage.held_out["loss"] == stage.evaluations[best]["loss"]
    train(write_mapping({**STEEP, "steps": best}, name="short.yaml"), tmp_path / "short")
    assert same(student_of(whole.path), student_of(tmp_path / "short"))


def test_a_stage_stops_after_evaluations_that_do_not_improve(whole: Run) -> None:
    stage = whole.stages["mixers"]
    assert stage.weights_of_step is not None
    assert stage.step == stage.weights_of_step + 2 < STEEP["steps"]
    (kept,) = (event for event in events_of(whole.path) if event["event"] == "weights-kept")
    assert kept["stopped_early"] is True
    assert f"`mixers`: {stage.step} steps, {stage.step * 32} tokens," in (whole.student / "README.md").read_text()


def test_the_next_stage_begins_with_the_best_weights(write_mapping: Write, tmp_path: Path, whole: Run) -> None:
    still = {**LOGIT_STAGE, "name": "still", "steps": 1, "optimizer": {"lr": 1e-30}}
    train(write_mapping(STOPPING, still), tmp_path / "two")
    assert same(student_of(whole.path), student_of(tmp_path / "two"))


@pytest.mark.parametrize("back", [3, 1, 0], ids=["before the best", "after the best", "when it stops"])
def test_a_resumed_run_keeps_the_same_best_and_stops_at_the_same_step(
    write_mapping: Write, tmp_path: Path, whole: Run, back: int
) -> None:
    mapping, stage = write_mapping(STOPPING), whole.stages["mixers"]
    with signal_after(stage.step - back), pytest.raises(Interrupted):
        train(mapping, tmp_path / "stopped")
    resumed = train(mapping, tmp_path / "stopped", resume=True).stages["mixers"]
    assert same(student_of(tmp_path / "stopped"), student_of(whole.path))
    assert resumed.weights_of_step == stage.weights_of_step
    assert (resumed.step, resumed.evaluations) == (stage.step, stage.evaluations)


def test_evaluations_before_the_weights_are_balanced_are_not_compared(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {**MIXER_STAGE["align"][0], "loss": {"kind": "relative_mse", "weight": "auto"}}
    other = {"name": "other", "tap": "mixer_output", "layers": "replaced", "loss": {"kind": "cosine"}}
    stage = {
        **MIXER_STAGE,
        "steps": 2,
        "align": [entry, other],
        "evaluation": {"every": 1, "batches": 1, "keep": "best"},
    }
    run = train(write_mapping(stage), tmp_path / "run").stages["mixers"]
    assert list(run.evaluations) == [1, 2] and run.weights_of_step == 2
    assert "so that the last weights are kept and not the best" in capsys.readouterr().out


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"evaluation": {"every": 0}}, "stages[0].evaluation.every: must be at least 1"),
    ({"evaluation": {"every": 2, "kep": "best"}}, "unknown key. Did you mean 'keep'?"),
    (
        {
            "evaluation": {"every": 2, "keep": "best"},
            "tokens": {"schedule": {"kind": "linear", "final": 0.5}},
        },
        "stages[0].evaluation: keep: best and patience compare held-out losses of different steps, but the weight of "
        "tokens has a schedule",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_compared_is_refused(write_mapping: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MappingFileError) as caught:
        make_plan(write_mapping({**LOGIT_STAGE, **changes}))
    assert message in str(caught.value)


def test_a_plan_without_held_out_text_is_refused(write_mapping: Write, text_file: Path) -> None:
    data = {"files": [str(text_file)], "sequence_length": 16, "held_out": 0}
    stage = {**LOGIT_STAGE, "evaluation": {"every": 1}}
    with pytest.raises(MappingFileError) as caught:
        make_plan(write_mapping(stage, data=data))
    assert "stages[0].evaluation: needs held-out text, and data.held_out is 0." in str(caught.value)
    make_plan(write_mapping(stage, data={**data, "evaluation": {"files": [str(text_file)]}}))


def test_a_plan_shows_that_a_stage_is_evaluated_and_averaged(write_mapping: Write) -> None:
    settings = {"every": 2, "keep": "best", "metric": "nll"}
    plan = make_plan(write_mapping({**LOGIT_STAGE, "evaluation": settings, "ema": {"decay": 0.99}}))
    console = Console(width=250)
    with console.capture() as capture:
        console.print(plan)
    assert "held-out nll every 2 steps, best kept; moving average of weights, decay 0.99" in capture.get()


def test_a_metric_that_stays_the_same_may_go_with_a_schedule(write_mapping: Write) -> None:
    tokens = {"schedule": {"kind": "linear", "final": 0.5}}
    plan = make_plan(
        write_mapping({**LOGIT_STAGE, "tokens": tokens, "evaluation": {"every": 1, "patience": 1, "metric": "nll"}})
    )
    settings = plan.stages[0].stage.evaluation
    assert settings is not None and settings.metric == "nll"


def test_an_opened_run_shows_its_held_out_figures(write_mapping: Write, tmp_path: Path) -> None:
    train(write_mapping({**MIXER_STAGE, "steps": 1, "evaluation": {"every": 1, "batches": 1}}), tmp_path / "run")
    assert "held-out" in Run(tmp_path / "run")._repr_html_()
