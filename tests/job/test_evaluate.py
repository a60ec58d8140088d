"""Measuring a finished run again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from xarch_kd.cli.app import main
from xarch_kd.errors import CheckpointError
from xarch_kd.evaluation.registry import SUITES
from xarch_kd.evaluation.results import read_evaluation
from xarch_kd.files import sha256_of
from xarch_kd.job.train import train
from xarch_kd.testing.mapping import MIXER_STAGE, TEXT
from xarch_kd.testing.runs import flip_bit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, text_file: Path) -> Path:
    """A finished run beside its mapping file, not measured yet, that tests leave as it is."""
    folder = tmp_path_factory.mktemp("finished")
    mapping = {
        "version": 1,
        "teacher": {"model": str(teacher_folder)},
        "student": {"convert": {"mixer": "mamba2", "replace": [1]}},
        "data": {"files": [str(text_file)], "sequence_length": 16, "batch_size": 2},
        "device": "cpu",
        "stages": [{**MIXER_STAGE, "steps": 1}],
    }
    (folder / "mapping.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(mapping))))
    return train(folder / "mapping.yaml", folder / "run").folder.root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    return tmp_path / "copy" / "run"


def test_a_run_is_measured_and_its_card_and_manifest_follow(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Not measured." in (run / "student" / "README.md").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--tokens", "128", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["results"]
    figures = printed["likelihood"][0]
    assert figures["text"] == "held-out"
    assert figures["rows"] == 128 // 16
    assert f"{figures['student_nll']:.4f}" in (run / "student" / "README.md").read_text()
    assert list(printed) == ["likelihood", "exposure", "generation", "diversity", "long_range", "speed"]
    copying = next(figure for figure in printed["long_range"]["figures"] if figure["name"] == "repeat copy")
    assert f"| repeat copy | {copying['teacher']:.4g} |" in (run / "student" / "README.md").read_text()
    files = json.loads((run / "manifest.json").read_text())["files"]
    assert files == {name: sha256_of(run / name) for name in files}
    assert "evaluation.json" in files


def test_one_suite_is_measured_and_others_keep_their_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--suites", "speed", "--lengths", "16,32", "--seconds", "30", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["results"]
    assert "likelihood" not in figures
    assert [(entry["tokens"], entry["student"]["decode"]["repeats"]) for entry in figures["speed"]["contexts"]] == [
        (16, 12),
        (32, 12),
    ]
    card = (run / "student" / "README.md").read_text()
    assert "What is gained, teacher → student, one sequence, bfloat16" in card and "NLL" not in card
    speed = read_evaluation(run / "evaluation.json").speed
    assert main(["evaluate", str(run), "--suites", "likelihood", "--tokens", "128"]) == 0
    after = read_evaluation(run / "evaluation.json")
    assert after.speed == speed and after.result("held-out").rows == 8
    assert "What is gained" in (run / "student" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suites", "sped"], "There is no suite 'sped'. Did you mean 'speed'?"),
        (["--suites", ""], "No suite was given."),
        (["--suites", "speed", "--tokens", "64"], "An option of the suite 'likelihood' was given"),
        (["--suites", "likelihood", "--seconds", "1"], "An option of the suite 'speed' was given"),
        (["--lengths", "64,16"], "lengths must increase, found 64, 16"),
        (["--lengths", "a"], "Context lengths are whole numbers"),
        (["--lengths", "1000"], "1,000 is beyond the 512 positions of the teacher"),
        (["--memory-gib", "1e-9"], "1 bytes do not hold one sequence of 256 tokens"),
        (["--dtype", "int3"], "dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_settings_of_a_suite_that_do_not_fit_are_refused(
    finished: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["evaluate", str(finished), *options]) == 2
    assert message in capsys.readouterr().err


def test_measuring_twice_gives_the_same_figures(run: Path) -> None:
    evaluations = []
    for _ in range(2):
        assert main(["evaluate", str(run), "--tokens", "128"]) == 0
        evaluations.append(read_evaluation(run / "evaluation.json"))
    assert evaluations[0] == evaluations[1]


def test_an_interrupted_evaluation_continues_after_its_last_suite(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(run), "--suites", "likelihood,long_range", "--tokens", "64"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(SUITES, "long_range", replace(SUITES["long_range"], measure=interrupted))
        assert main(command) == 130
    assert not (run / "evaluation.json").exists()
    with monkeypatch.context() as patch:
        patch.setitem(SUITES, "likelihood", replace(SUITES["likelihood"], measure=interrupted))
        assert main(command) == 0
    assert "measured before the interruption: likelihood" in capsys.readouterr().out
    assert list(read_evaluation(run / "evaluation.json").results) == ["likelihood", "long_range"]
    assert not list(run.glob("*partial*"))


@pytest.mark.parametrize(("gate", "code"), [("-1000", 1), ("1000", 0)])
def test_a_gate_decides_the_exit_code(run: Path, capsys: pytest.CaptureFixture[str], gate: str, code: int) -> None:
    assert main(["evaluate", str(run), "--suites", "likelihood", "--tokens", "128", "--gate", gate]) == code
    assert ("too far above the teacher's" in capsys.readouterr().err) == bool(code)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "not a run folder with a student" in capsys.readouterr().err


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["student/model.safetensors", "student/config.json", "plan.json"])
def test_a_damaged_file_of_a_finished_run_is_named_and_stays_so(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flip_bit(run / name)
    before = files_of(run)
    for command in ("evaluate", "show"):
        assert main([command, str(run)]) == 3
        # A plan that is no JSON any more is found when it is read.
        error = capsys.readouterr().err
        assert f"{name} is not the file that the run wrote" in error or f"{name} of the run is damaged" in error
    if name.startswith("student/"):
        assert main(["export", str(run), "--output", str(run.parent / "exported")]) == 3
        assert f"{name} is not the file" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match="is not the file that the run wrote"):
            train(run.parent / "mapping.yaml", run)
    assert files_of(run) == before


def test_a_missing_file_and_a_damaged_manifest_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (run / "student" / "tokenizer.json").read_bytes()
    (run / "student" / "tokenizer.json").unlink()
    assert main(["evaluate", str(run)]) == 3
    assert re.search(r"student/tokenizer\.json is not the file[\s\S]*no such file", capsys.readouterr().err)
    (run / "student" / "tokenizer.json").write_bytes(content)
    (run / "manifest.json").write_text("{")
    assert main(["evaluate", str(run)]) == 3
    assert "the manifest of the run is damaged" in capsys.readouterr().err
    (run / "manifest.json").unlink()
    assert main(["evaluate", str(run)]) == 2
    assert "the run is not finished" in capsys.readouterr().err


def test_measuring_does_not_hide_damage_to_files_that_it_does_not_read(run: Path) -> None:
    flip_bit(run / "stages" / "01-mixers" / "trained.safetensors")
    before = json.loads((run / "manifest.json").read_text())["files"]
    assert main(["evaluate", str(run), "--suites", "likelihood", "--tokens", "128"]) == 0
    after = json.loads((run / "manifest.json").read_text())["files"]
    written = {"evaluation.json", "student/README.md", "student/checksums.json"}
    assert {name: digest for name, digest in after.items() if before.get(name) != digest}.keys() == written


@pytest.fixture
def relative_run(tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run whose mapping file has relative paths, trained in the folder `project`."""
    project = tmp_path / "project"
    shutil.copytree(teacher_folder, project / "teacher")
    (project / "text.txt").write_text("".join(f"{number}. {TEXT}" for number in range(40)))
    mapping = {
        "version": 1,
        "teacher": {"model": "teacher"},
        "student": {"convert": {"mixer": "mamba2", "replace": [1]}},
        "data": {"files": ["text.txt"], "sequence_length": 16, "batch_size": 2},
        "device": "cpu",
        "stages": [{**MIXER_STAGE, "steps": 1}],
        "evaluate": {"suites": ["likelihood", "exposure"], "tokens": 128},
    }
    (project / "mapping.yaml").write_text(yaml.safe_dump(mapping))
    monkeypatch.chdir(project)
    train("mapping.yaml", "runs/base")
    return project / "runs" / "base"


def test_a_run_is_measured_on_its_own_text_from_any_folder(
    relative_run: Path, tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = read_evaluation(relative_run / "evaluation.json")
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other / "teacher")
    (other / "text.txt").write_text("".join(f"{number}: something else {TEXT}" for number in range(40)))
    monkeypatch.chdir(other)
    assert main(["evaluate", "../project/runs/base"]) == 0
    assert read_evaluation(relative_run / "evaluation.json") == measured
    assert Path.cwd() == other


def test_another_text_of_another_kind_is_warned_of(relative_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project, name = relative_run.parent.parent, "also.txt"
    mapping = yaml.safe_load((project / "mapping.yaml").read_text())
    mapping["evaluate"] = {"suites": ["likelihood"], "tokens": 64, "also": [{"files": [name]}]}
    (project / "mapping.yaml").write_text(yaml.safe_dump(mapping))
    for text, warns in ((TEXT * 4, False), (TEXT.upper() * 4, True)):
        (project / name).write_text(text)
        if not (project / "runs" / "also").exists():
            train("mapping.yaml", "runs/also")
        capsys.readouterr()
        assert main(["evaluate", "runs/also", "--suites", "likelihood"]) == 0
        assert (f"warning: {name} has other tokens" in capsys.readouterr().out) == warns


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda project: (project / "text.txt").write_text("".join(f"{number}; {TEXT}" for number in range(40))),
            "held-out text: ",
        ),
        (lambda project: flip_bit(project / "teacher" / "model.safetensors"), "teacher, model.safetensors: "),
    ],
)
def test_another_text_or_teacher_is_not_measured_in_place_of_the_runs_own(
    relative_run: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object], named: str
) -> None:
    change(relative_run.parent.parent)
    before = files_of(relative_run)
    assert main(["evaluate", str(relative_run)]) == 2
    message = capsys.readouterr().err
    assert "made from other inputs" in message
    assert f"found:   {named}" in message
    assert files_of(relative_run) == before
