"""Measuring a finished run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xarch_kd.cli.app import main
from xarch_kd.evaluation.results import read_evaluation
from xarch_kd.files import sha256_of
from xarch_kd.job.train import train
from xarch_kd.testing.mapping import MIXER_STAGE, Write


@pytest.fixture
def run(write_mapping: Write, tmp_path: Path) -> Path:
    """A finished run, not measured yet."""
    return train(write_mapping(MIXER_STAGE), tmp_path / "run").folder.root


def test_a_run_is_measured_and_its_card_and_manifest_follow(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Not measured." in (run / "student" / "README.md").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--tokens", "128", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["likelihood"][0]
    assert figures["text"] == "held-out"
    assert figures["rows"] == 128 // 16
    assert f"{figures['student_nll']:.4f}" in (run / "student" / "README.md").read_text()
    files = json.loads((run / "manifest.json").read_text())["files"]
    assert files == {name: sha256_of(run / name) for name in files}
    assert "evaluation.json" in files


def test_measuring_twice_gives_the_same_figures(run: Path) -> None:
    evaluations = []
    for _ in range(2):
        assert main(["evaluate", str(run), "--tokens", "128"]) == 0
        evaluations.append(read_evaluation(run / "evaluation.json"))
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize(("gate", "code"), [("-1000", 1), ("1000", 0)])
def test_a_gate_decides_the_exit_code(run: Path, capsys: pytest.CaptureFixture[str], gate: str, code: int) -> None:
    assert main(["evaluate", str(run), "--tokens", "128", "--gate", gate]) == code
    assert ("too far above the teacher's" in capsys.readouterr().err) == bool(code)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "not a run folder with a student" in capsys.readouterr().err
