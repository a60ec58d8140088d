"""`xarch-kd verify`: every file of a run, a checkpoint or a student is compared with its hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xarch_kd.cli.app import main
from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.files import damage_of, seal, seal_again, sha256_of, write_tensors
from xarch_kd.models.loading.load import load_model
from xarch_kd.models.loading.save import save_student
from xarch_kd.run.integrity import verify_folder
from xarch_kd.testing.runs import flip_bit
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flip": (flip_bit, "damaged"),
    "torn": (cut, "damaged"),
    "delete": (Path.unlink, "missing"),
}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tiny_model("llama"), tiny_tokenizer(), tmp_path_factory.mktemp("saved") / "student")


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_every_file_of_a_student_is_checked_and_none_is_loaded_damaged(
    student: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, wrong = DAMAGES[kind]
    files = sorted(path.name for path in student.iterdir() if path.name != "checksums.json")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert main(["verify", str(student)]) == 0
    assert f"student, {len(files)} files compared, 0 damaged" in capsys.readouterr().out
    for name in files:
        content = (student / name).read_bytes()
        damage(student / name)
        assert verify_folder(student).damage == (f"{name} is {wrong}",)
        with pytest.raises(CheckpointError, match=rf"{name} is {wrong}: the model is not what was written"):
            load_model(str(student))
        (student / name).write_bytes(content)
    assert main(["verify", str(student), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["damage"] == []
    load_model(str(student))


def test_a_damaged_file_is_named_by_the_command(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "events.jsonl").write_text("{}\n")
    (run / "manifest.json").write_text(json.dumps({"files": {"events.jsonl": sha256_of(run / "events.jsonl")}}))
    (run / "notes.txt").write_text("mine")
    assert main(["verify", str(run)]) == 0
    assert "finished run, 1 files compared, 0 damaged\n  without a hash: notes.txt" in capsys.readouterr().out
    (run / "events.jsonl").write_text("{ }\n")
    assert main(["verify", str(run)]) == 3
    assert "events.jsonl is damaged" in capsys.readouterr().err
    (run / "manifest.json").write_text("{")
    assert verify_folder(run).damage == ("manifest.json is damaged",)
    with pytest.raises(UsageError, match="nothing to compare"):
        verify_folder(tmp_path / "elsewhere")


def test_an_unfinished_run_has_its_stages_and_checkpoints_checked(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    stages = tmp_path / "stages"
    write_tensors(stages / "01-a" / "trained.safetensors", {"w": torch.ones(3)})
    for step in (4, 5, 10):
        folder = stages / "02-b" / f"checkpoint-{step}"
        write_tensors(folder / "trained.safetensors", {"w": torch.full((3,), float(step))})
        seal(folder)
    found = verify_folder(tmp_path)
    assert (found.damage, found.compared, found.unlisted) == ((), 7, ("plan.json",))
    assert found.resumes_from == "stages/02-b/checkpoint-10"
    flip_bit(stages / "02-b" / "checkpoint-10" / "trained.safetensors")
    (stages / "02-b" / "checkpoint-4" / "checksums.json").unlink()
    cut(stages / "01-a" / "trained.safetensors")
    found = verify_folder(tmp_path)
    assert found.resumes_from == "stages/02-b/checkpoint-5"
    assert found.damage[0].startswith("stages/01-a/trained.safetensors: trained.safetensors cannot be read")
    assert found.damage[1:] == (
        "stages/02-b/checkpoint-4/checksums.json is missing",
        "stages/02-b/checkpoint-10/trained.safetensors is damaged",
    )


def test_hashes_of_other_files_are_kept_when_one_is_written_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    (tmp_path / "a").write_text("damaged")
    (tmp_path / "b").write_text("new")
    seal_again(tmp_path, tmp_path / "b")
    assert damage_of(tmp_path) == "a is damaged"
