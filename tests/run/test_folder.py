"""Run folders: which are accepted, what a failed run leaves behind, and writes to a full disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.files import sha256_of, write_text
from xarch_kd.run.fingerprint import Fingerprint
from xarch_kd.run.folder import RunFolder

MADE_FROM = Fingerprint(inputs={"training text": "a"}, packages={"torch": "2.13.0"}, working_directory="/")


def test_a_new_or_empty_folder_is_new(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "absent").state("f") == "new"
    assert RunFolder(tmp_path).state("f") == "new"


def test_a_run_is_unfinished_until_its_manifest_is_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start("version: 1\n", {"stages": []}, "f", MADE_FROM)
    assert folder.state("f") == "unfinished"
    folder.finish()
    assert folder.state("f") == "finished"


def test_the_manifest_covers_every_other_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start("version: 1\n", {}, "f", MADE_FROM)
    write_text(folder.student / "config.json", "{}")
    folder.finish()
    files = json.loads(folder.manifest.read_text())["files"]
    assert set(files) == {"mapping.yaml", "plan.json", "environment.json", "student/config.json"}
    assert files["student/config.json"] == sha256_of(folder.student / "config.json")


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds something else than a run[\s\S]*found: +thesis\.tex") as refused:
        RunFolder(tmp_path).state("f")
    assert refused.value.exit_code == 2


def test_a_run_of_another_mapping_file_is_refused(tmp_path: Path) -> None:
    before = {"seed": 0, "stages": [{"name": "a", "steps": 4}, {"name": "b"}]}
    RunFolder(tmp_path).start("version: 1\n", {"mapping": before}, "one", MADE_FROM)
    now = {"seed": 0, "stages": [{"name": "a", "steps": 5}]}
    with pytest.raises(UsageError, match="holds the run of another mapping file") as refused:
        RunFolder(tmp_path).state("two", now)
    assert [line.strip() for line in str(refused.value).splitlines()[3:5]] == [
        "stages[0].steps: 4 at the start, 5 now",
        'stages[1].name: "b" at the start, absent now',
    ]


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    RunFolder(tmp_path).start("version: 1\n", {}, "one", MADE_FROM)
    (tmp_path / "plan.json").write_text("{")
    for use in (lambda folder: folder.state("one"), lambda folder: folder.recorded()):
        with pytest.raises(CheckpointError, match=r"plan\.json of the run is damaged"):
            use(RunFolder(tmp_path))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="the output is not a folder"):
        RunFolder(tmp_path / "file").state("f")


def test_two_processes_cannot_work_in_one_folder(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "run").locked(),
        pytest.raises(UsageError, match="another run is working"),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunFolder(tmp_path / "a" / "run").locked():
        raise RuntimeError
    assert not (tmp_path / "a").exists()


def test_a_folder_outside_the_run_is_never_removed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "run" / "features"
    outside.mkdir()
    inside.mkdir(parents=True)
    folder = RunFolder(tmp_path / "run")
    folder.drop(outside)
    folder.drop(inside)
    assert outside.exists()
    assert not inside.exists()
