"""Sweeps: the grid, its folders, what is refused before anything trains, and repetition of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from xarch_kd.cli.app import main
from xarch_kd.errors import MappingFileError, UsageError
from xarch_kd.job.sweep import parse_setting, swept_runs
from xarch_kd.testing.mapping import LOGIT_STAGE, Write

STAGE = {**LOGIT_STAGE, "steps": 1}
EVALUATE: dict[str, Any] = {"tokens": 64, "suites": ["likelihood"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.0.lr=1e-3,0.01", ("a.0.lr", [1e-3, 0.01])),
        ("x={strategy: cka, y: [1, 2]},same", ("x", [{"strategy": "cka", "y": [1, 2]}, "same"])),
        ("x=no,true", ("x", ["no", True])),
    ],
)
def test_settings_are_read_as_in_a_mapping_file(text: str, expected: tuple[str, list[Any]]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["x", "=1", "x="])
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="a key and its values"):
        parse_setting(text)
    with pytest.raises(MappingFileError, match="not valid YAML"):
        parse_setting("x=[1")


def test_the_grid_has_every_combination_and_names_it(write_mapping: Write) -> None:
    path = write_mapping(STAGE, evaluate=EVALUATE)
    runs = swept_runs(path, {"stages.0.optimizer.lr": [0.1, 0.2], "stages.0.steps": [1, 2]}, seeds=2)
    assert [run.name for run in runs[:3]] == ["lr=0.1,steps=1,seed=0", "lr=0.1,steps=1,seed=1", "lr=0.1,steps=2,seed=0"]
    assert len(runs) == 8
    last = runs[-1].plan
    assert (last.mapping.stages[0].optimizer.lr, last.stages[0].steps, last.mapping.seed) == (0.2, 2, 1)
    assert yaml.safe_load(path.read_text())["stages"][0]["optimizer"]["lr"] == 1e-3


def test_bad_grids_are_refused_before_training(write_mapping: Write) -> None:
    path = write_mapping(STAGE, evaluate=EVALUATE)
    for settings, seeds, message in (
        ({"stages.0.optimiser.lr": [1, 2]}, 1, "Did you mean 'optimizer'"),
        ({"stages.3.steps": [1, 2]}, 1, "no '3' there"),
        ({"stages.0.steps": [1, 1]}, 1, "different values"),
        ({"seed": [1, 2]}, 2, "given twice"),
        ({}, 1, "compares nothing"),
    ):
        with pytest.raises(UsageError, match=message):
            swept_runs(path, settings, seeds)
    with pytest.raises(MappingFileError, match="stepz"):
        swept_runs(path, {"stages.0.stepz": [1, 2]})
    with pytest.raises(UsageError, match="does not evaluate"):
        swept_runs(write_mapping(STAGE, name="bare.yaml"), {"stages.0.steps": [1, 2]})


def test_a_sweep_trains_compares_and_is_kept(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_mapping(STAGE, evaluate=EVALUATE)
    command = ["sweep", str(path), "-o", str(tmp_path / "sweep"), "--set", "stages.0.optimizer.lr=1e-3,0.5"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    runs = sorted(folder for folder in (tmp_path / "sweep").iterdir() if folder.is_dir())
    assert [run.name for run in runs] == ["lr=0.001", "lr=0.5"]
    assert "Runs: quality and cost" in printed and "run 2 of 2: lr=0.5" in printed
    assert "paired differences" in (tmp_path / "sweep" / "comparison.html").read_text()
    written = [(run / "student" / "model.safetensors").stat().st_mtime_ns for run in runs]
    assert main(command) == 0
    assert [(run / "student" / "model.safetensors").stat().st_mtime_ns for run in runs] == written
