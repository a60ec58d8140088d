"""Projector reports of a run; no projector is in the student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from xarch_kd.calibration import projector_report
from xarch_kd.calibration.initialize import FIRST_TOKENS
from xarch_kd.calibration.projector_report import halves
from xarch_kd.cli.app import main
from xarch_kd.data.rows import Rows
from xarch_kd.errors import Interrupted
from xarch_kd.job.models import load_models, load_run_tokenizer
from xarch_kd.job.texts import run_text
from xarch_kd.job.train import train
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.report import Reporter
from xarch_kd.taps.trace import trace
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.rows import ids_of
from xarch_kd.testing.runs import same, signal_after, student_of
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.checkpoints import STATE_FILE

LINEAR: dict[str, Any] = {
    "name": "stream",
    "steps": 4,
    "train": ["mixers"],
    "align": [{"name": "hidden", "tap": "hidden", "layers": [{"student": 1, "teacher": 2}], "projector": "linear"}],
    "optimizer": {"lr": 1e-3, "projector_lr": 1e-2},
}
# The student stays as it is and only the projector learns.
LAZY = {**LINEAR, "optimizer": {"lr": 1e-12, "projector_lr": 1e-2}}
SHORT = {"calibration": {"tokens": 1024}}


TWO_STAGES = (LINEAR, {**LINEAR, "name": "later", "optimizer": {"lr": 1e-2, "projector_lr": 1e-2}})


def reports_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "projectors.json").read_text())["projectors"]


def dense_features(plan: Plan, student: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of student block 1 and teacher block 2 at the tokens that count, [tokens, width] in float64."""
    models = load_models(plan, load_run_tokenizer(plan), Reporter.silent())
    with torch.no_grad():
        pair = (
            trace(model.eval(), rows, taps=["hidden"], layers=[layer])["hidden"][layer]
            for model, layer in ((student or models.student, 1), (models.teacher, 2))
        )
        own, target = (features[:, FIRST_TOKENS:].flatten(0, 1).double() for features in pair)
    return own, target


def explained(own: Tensor, target: Tensor, weight: Tensor) -> float:
    total = (target - target.mean(0)).square().sum()
    return float(1 - (own @ weight.double().T - target).square().sum() / total)


def rows_of(plan: Plan) -> Rows:
    return run_text(plan, load_run_tokenizer(plan), Reporter.silent()).training


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """Folders of runs that are not stopped, once they were made."""
    return {}


Whole = Callable[..., Path]


@pytest.fixture
def whole(write_mapping: Write, tmp_path_factory: pytest.TempPathFactory, made: dict[str, Path]) -> Whole:
    """Return the run of these stages, made once."""

    def run(*stages: dict[str, Any]) -> Path:
        name = "-".join(stage["name"] for stage in stages)
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            train(write_mapping(*stages, **SHORT), folder)
            made[name] = folder
        return made[name]

    return run


def test_the_figures_are_those_of_dense_features(write_mapping: Write, whole: Whole) -> None:
    mapping, run = write_mapping(LINEAR, **SHORT), whole(LINEAR)
    (report,) = reports_of(run)
    plan = make_plan(mapping)
    fitted, held_out = map(ids_of, halves(rows_of(plan), 1024, plan.mapping.seed))
    assert fitted.shape == held_out.shape == (32, 16)
    weight = load_file(run / "projectors.safetensors")["stream.hidden-1.weight"]
    trained = AutoModelForCausalLM.from_pretrained(run / "student")
    # Features in float32, of which one in 512 · 64 is summed in another order than the pass of the run.
    close = pytest.approx
    assert report["explained"] == close(explained(*dense_features(plan, trained, held_out), weight), abs=1e-5)
    own, target = dense_features(plan, None, fitted)
    penalty = 1e-3 * (own.T @ own).diagonal().mean()
    alone = torch.linalg.solve(own.T @ own + penalty * torch.eye(64).double(), own.T @ target).T
    assert report["alone"] == close(explained(*dense_features(plan, None, held_out), alone), abs=1e-5)
    values = torch.linalg.svdvals(weight.double())
    assert report["condition"] == close(float(values[0] / values[-1]), rel=1e-6)
    assert report["rank"] == int((values > 1e-3 * values[0]).sum()) and report["possible_rank"] == 64
    assert report["share"] == close(min(max(report["alone"] / report["explained"], 0), 1))
    assert (report["stage"], report["projector"], report["pairs"]) == ("stream", "hidden.1", ["hidden.1"])
    assert (report["kind"], report["tokens"]) == ("linear", 32 * (16 - FIRST_TOKENS))


def test_a_projector_that_learns_in_the_students_place_is_warned_of(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, warning = tmp_path / "run", "the projector does the student's work"
    assert main(["train", str(write_mapping(LAZY, **SHORT)), "--output", str(run)]) == 0
    printed = capsys.readouterr().out
    (report,) = reports_of(run)
    assert report["share"] >= 0.9 and [said.partition(":")[0] for said in report["warnings"]] == [warning]
    assert "projector hidden.1 (linear, rank 64 of 64" in printed and f"warning: {warning}" in printed
    card = (run / "student" / "README.md").read_text()
    assert f"Warning of stage stream, projector hidden.1: {warning}" in card
    assert main(["show", str(run), "--tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"stream, hidden.1: {warning}" in shown and f"{report['explained']:.0%}" in shown


def test_one_that_explains_nothing_is_called_useless_and_not_that(write_mapping: Write, tmp_path: Path) -> None:
    # Of equal widths it starts as the identity, which relates no two blocks' mixers.
    random = {**LINEAR["align"][0], "tap": "mixer_output", "projector": {"kind": "linear", "init": "random"}}
    stage = {**LINEAR, "align": [random], "optimizer": {"lr": 1e-3, "projector_lr": 1e-12}}
    train(write_mapping(stage, **SHORT), tmp_path / "run")
    (report,) = reports_of(tmp_path / "run")
    assert report["alone"] > 0.05 and report["explained"] < 0.05
    assert [said.partition(":")[0] for said in report["warnings"]] == ["useless"]


@pytest.mark.parametrize("count", [2, 4, 6])
def test_a_resumed_run_says_and_keeps_the_same(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole, count: int
) -> None:
    mapping, expected = write_mapping(*TWO_STAGES, **SHORT), whole(*TWO_STAGES)
    with signal_after(count), pytest.raises(Interrupted):
        train(mapping, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "projectors.safetensors").exists()
    measured = []
    alone = projector_report.alone
    monkeypatch.setattr(projector_report, "alone", lambda *given: measured.append(given) or alone(*given))
    train(mapping, tmp_path / "stopped", resume=True)
    assert len(measured) == (count <= 4)
    for name in ("projectors.json", "projectors.safetensors", "student/model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (expected / name).read_bytes(), name
    first, later = reports_of(expected)
    assert (first["stage"], later["stage"]) == ("stream", "later")
    # The second stage starts with the student that the first one trained.
    assert later["alone"] != first["alone"]


def test_the_start_of_a_stage_that_began_unmeasured_is_not_made_up(write_mapping: Write, tmp_path: Path) -> None:
    mapping, run = write_mapping(LINEAR, **SHORT), tmp_path / "run"
    with signal_after(2), pytest.raises(Interrupted):
        train(mapping, run)
    (run / "stages" / "01-stream" / "projectors-alone.json").unlink()
    train(mapping, run, resume=True)
    (report,) = reports_of(run)
    assert report["alone"] is None and report["share"] is None
    assert report["note"] == "a projector alone was not measured before the stage began"


def test_stages_without_projectors_cost_and_leave_nothing(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("calibration text was read")

    monkeypatch.setattr(projector_report, "observations", never)
    run = train(write_mapping(MIXER_STAGE, LOGIT_STAGE), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").rglob("*")}
    assert not {"projectors.json", "projectors-alone.json", "projectors.safetensors"} & names
    assert "Warning" not in (run.student / "README.md").read_text()


def test_too_little_text_is_said_and_no_failure(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two rows of 16 tokens, of which 12 count in each half; the projector has 64 dimensions.
    train(write_mapping(LINEAR, calibration={"tokens": 64}), tmp_path / "run")
    (report,) = reports_of(tmp_path / "run")
    assert report["alone"] is None and report["tokens"] == 2 * (16 - FIRST_TOKENS)
    assert "ridge in 64 dimensions is fitted to more tokens than the 24 of calibration text, 256" in report["note"]
    assert report["note"] in capsys.readouterr().out


def test_no_projector_is_in_the_student(write_mapping: Write, whole: Whole) -> None:
    mapping, run = write_mapping(LINEAR, **SHORT), whole(LINEAR)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run / "student"))
    stored, tied = student_of(run), set(plain._tied_weights_keys or ())
    assert set(stored) | tied == set(plain.state_dict()) and not any("projector" in name for name in stored)
    assert not list((run / "student").glob("projectors*"))
    assert set(load_file(run / "projectors.safetensors")) == {"stream.hidden-1.weight"}
    plan = make_plan(mapping)
    models = load_models(plan, load_run_tokenizer(plan), Reporter.silent())
    aligner = Aligner(plan, teacher=models.teacher, student=models.student)
    aligner.load_trained_state(run / "stages" / "01-stream" / STATE_FILE)
    assert list(aligner.projectors) == ["hidden-1"]
    student, ids = AutoModelForCausalLM.from_pretrained(run / "student"), ids_of(rows_of(plan))[:4]
    assert same(dict(aligner.student.state_dict()), dict(student.state_dict()))
    with torch.no_grad():
        assert torch.equal(student(ids).logits, aligner.student.eval()(ids).logits)
        assert not torch.equal(student(ids).logits, plain(ids).logits)
