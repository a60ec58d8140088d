"""The run folder: what it accepts, what it leaves behind, and that nothing is lost when the disk is full."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.run import folder as run_folder
from xarch_kd.run.folder import RunFolder, sha256_of, write_tensors, write_text


def test_a_new_or_empty_folder_is_new(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "absent").state("f") == "new"
    assert RunFolder(tmp_path).state("f") == "new"


def test_a_run_is_unfinished_until_its_manifest_is_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start("version: 1\n", {"stages": []}, "f")
    assert folder.state("f") == "unfinished"
    folder.finish()
    assert folder.state("f") == "finished"


def test_the_manifest_covers_every_other_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start("version: 1\n", {}, "f")
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
    RunFolder(tmp_path).start("version: 1\n", {}, "one")
    with pytest.raises(UsageError, match="holds the run of another mapping file"):
        RunFolder(tmp_path).state("two")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="the output is not a folder"):
        RunFolder(tmp_path / "file").state("f")


def test_two_processes_cannot_work_in_one_folder(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "run").locked(),
        pytest.raises(UsageError, match="another process is working"),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunFolder(tmp_path / "a" / "run").locked():
        raise RuntimeError
    assert not (tmp_path / "a").exists()


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"a": torch.ones(3)})

    def full(tensors: object, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write state\.safetensors[\s\S]*no space left on the disk"):
        write_tensors(path, {"a": torch.zeros(3)})
    assert load_file(path)["a"].tolist() == [1.0, 1.0, 1.0]
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_text_on_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "plan.json", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="run again with --resume") as refused:
        write_text(tmp_path / "plan.json", "new")
    assert refused.value.exit_code == 3
    assert (tmp_path / "plan.json").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_outside_the_run_is_never_removed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "run" / "features"
    outside.mkdir()
    inside.mkdir(parents=True)
    folder = RunFolder(tmp_path / "run")
    folder.drop(outside)
    folder.drop(inside)
    assert outside.exists()
    assert not inside.exists()
