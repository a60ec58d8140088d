"""`xarch-kd show`."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from tests.cli.conftest import XarchKd
from xarch_kd.calibration.projector_report import ProjectorReport, write_reports
from xarch_kd.evaluation.results import Evaluation, LikelihoodResult, write_evaluation
from xarch_kd.projectors.diagnostics import Diagnosis
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

MAPPING = """
version: 1
teacher: {{model: "{teacher}"}}
student: {{convert: {{mixer: mamba2, replace: [0]}}}}
data: {{builtin: python-docs}}
stages:
  - name: logits
    steps: 1
    train: [mixers]
    tokens: {{divergence: forward_kl}}
"""


@pytest.fixture
def run_folder(teacher: Path, tmp_path: Path) -> Path:
    """A finished run folder with a random student and made-up figures."""
    run = tmp_path / "run"
    tiny_model("bamba", seed=1).save_pretrained(run / "student")
    tiny_tokenizer().save_pretrained(run / "student")
    (run / "mapping.yaml").write_text(MAPPING.format(teacher=teacher))
    likelihood = LikelihoodResult(
        text="held-out",
        description="of the training corpus",
        rows=4,
        tokens=1020,
        fingerprint="0",
        teacher_nll=2.247,
        student_nll=2.295,
        difference=0.048,
        low=0.04,
        high=0.056,
        p_value=0.001,
        by_position=(),
    )
    whole = Evaluation(
        teacher="teacher", student="student", level=0.95, resamples=1000, seed=0, results={"likelihood": (likelihood,)}
    )
    write_evaluation(whole, run / "evaluation.json")
    return run


def test_the_whole_screen(run_folder: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("show", run_folder, "--tokens", "5")
    assert done.code == 0, done.err
    assert "2.247" in done.out and "2.295" in done.out
    assert re.search(r"teacher\s*┃\s*student", done.out)
    assert done.out.count("Once upon a time") == 2
    code = done.out.rstrip().splitlines()[-3:]
    namespace: dict[str, object] = {}
    exec("\n".join(code), namespace)
    assert type(namespace["student"]).__name__ == "BambaForCausalLM"


def test_prompts_can_be_given(run_folder: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("show", run_folder, "--tokens", "3", "--prompt", "[bold]one", "--prompt", "two", "--seed", "4")
    assert done.code == 0, done.err
    assert done.out.count("[bold]one") == 2
    assert "Once upon a time" not in done.out


def test_a_run_without_evaluation_prints_the_command_for_it(run_folder: Path, xarch_kd: XarchKd) -> None:
    (run_folder / "evaluation.json").unlink()
    done = xarch_kd("show", run_folder, "--tokens", "3")
    assert done.code == 0
    assert f"Not evaluated yet: xarch-kd evaluate {run_folder}" in done.out


@pytest.mark.parametrize(
    ("missing", "message"),
    [("student/config.json", "--resume"), ("mapping.yaml", "is not a run folder"), ("", "There is no run folder")],
)
def test_a_folder_that_is_no_finished_run_is_a_usage_error(
    missing: str, message: str, run_folder: Path, xarch_kd: XarchKd
) -> None:
    if missing:
        (run_folder / missing).unlink()
        done = xarch_kd("show", run_folder)
    else:
        done = xarch_kd("show", run_folder / "elsewhere")
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_projectors_of_the_run_have_a_table(run_folder: Path, xarch_kd: XarchKd) -> None:
    diagnosis = Diagnosis(
        kind="linear",
        rank=60,
        possible_rank=64,
        condition=math.inf,
        explained=0.5,
        ceiling=0.9,
        alone=None,
        warnings=("narrow: [so]",),
    )
    report = ProjectorReport(
        stage="mixers", projector="stream.3", pairs=("stream.3",), tokens=9, diagnosis=diagnosis, note=None
    )
    write_reports(run_folder / "projectors.json", [report])
    done = xarch_kd("show", run_folder, "--tokens", "2")
    assert done.code == 0, done.err
    (row,) = [line for line in done.out.splitlines() if line.startswith("│ mixers")]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["mixers", "stream.3", "linear", "60/64", "inf", "50%", "-"]
    assert "mixers, stream.3: narrow: [so]" in done.out
    (run_folder / "projectors.json").unlink()
    assert "stream.3" not in xarch_kd("show", run_folder, "--tokens", "2").out
