"""A run is resumed, and a finished one returned, only for the inputs that it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from xarch_kd.cli.app import main
from xarch_kd.errors import Interrupted, UsageError
from xarch_kd.job.fingerprint import student_inputs
from xarch_kd.job.train import train
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run import fingerprint
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, TEXT, Write
from xarch_kd.testing.runs import same, signal_after, student_of
from xarch_kd.testing.tiny import tiny_tokenizer

STAGE: dict[str, Any] = {**MIXER_STAGE, "steps": 6, "batches": 4, "checkpoint_every": 4, "cache": "disk"}


@pytest.fixture
def teacher(teacher_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher that a test may change."""
    return Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Forty files of text."""
    paths = [tmp_path / f"text-{number:02d}.txt" for number in range(40)]
    for number, path in enumerate(paths):
        path.write_text("".join(f"{number}.{line} {TEXT}" for line in range(2)))
    return paths


@pytest.fixture
def mapping(write_mapping: Write, teacher: Path, texts: list[Path], tmp_path: Path) -> Path:
    data = {"files": [str(tmp_path / "text-*.txt")], "sequence_length": 16, "batch_size": 2}
    return write_mapping(STAGE, teacher={"model": str(teacher)}, data=data)


def stop(mapping: Path, run: Path) -> None:
    with signal_after(4), pytest.raises(Interrupted):
        train(mapping, run)


def refusal(mapping: Path, run: Path, *, resume: bool = True) -> str:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as refused:
        train(mapping, run, resume=resume)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    return str(refused.value)


def test_features_of_an_overwritten_text_are_not_trained_on(mapping: Path, texts: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop(mapping, run)
    assert list((run / "stages" / "01-mixers" / "features").iterdir())
    for path in texts:
        path.write_text(path.read_text().upper())
    text = refusal(mapping, run)
    assert "the run cannot be resumed: 2 of the things that it is made from changed" in text
    at_start = json.loads((run / "plan.json").read_text())["made_from"]["inputs"]
    for name in ("training text", "held-out text"):
        assert f"{name}: {at_start[name]} at the start, " in text
    assert "another --output, or restore what changed and resume" in text


def test_ten_of_forty_changed_files_are_refused_and_restored_ones_resume(
    mapping: Path, texts: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stop(mapping, run)
    originals = [path.read_text() for path in texts[:10]]
    for path in texts[:10]:
        path.write_text(path.read_text().replace("fox", "cat"))
    assert "training text" in refusal(mapping, run)
    for path, original in zip(texts[:10], originals, strict=True):
        path.write_text(original)
    train(mapping, run, resume=True)
    train(mapping, tmp_path / "whole")
    assert same(student_of(run), student_of(tmp_path / "whole"))


def change_weight(teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})


def change_config(teacher: Path) -> None:
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


def change_template(teacher: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(teacher)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weight, "teacher, model.safetensors: "),
        (change_config, "teacher, config.json: "),
        (change_template, "tokenizer: 97 tokens, sha256 "),
    ],
)
def test_another_teacher_or_tokenizer_is_refused(
    mapping: Path, teacher: Path, tmp_path: Path, change: Any, named: str
) -> None:
    stop(mapping, tmp_path / "run")
    change(teacher)
    text = refusal(mapping, tmp_path / "run")
    assert f"found:   {named}" in text
    assert "1 of the things" in text


def test_another_release_of_transformers_is_refused_and_a_patch_warned_of(
    mapping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    installed = fingerprint.installed_packages()
    major, minor, *patch = installed["transformers"].split(".")
    stop(mapping, run)
    later = {**installed, "transformers": f"{major}.{int(minor) + 1}.0"}
    monkeypatch.setattr("xarch_kd.job.fingerprint.installed_packages", lambda: later)
    assert f"transformers: {major}.{minor} at the start, {major}.{int(minor) + 1} now" in refusal(mapping, run)
    later["transformers"] = ".".join([major, minor, f"{patch[0]}1"])
    capsys.readouterr()
    train(mapping, run, resume=True)
    warning = f"warning: version of transformers: {installed['transformers']} at the start, {later['transformers']} now"
    assert warning in capsys.readouterr().out


def test_a_student_that_exists_is_an_input_with_its_own_tokenizer(
    write_mapping: Write, teacher: Path, tmp_path: Path
) -> None:
    student = Path(shutil.copytree(teacher, tmp_path / "student"))
    plan = make_plan(write_mapping({**LOGIT_STAGE, "train": ["all"]}, student={"model": str(student)}))
    before = student_inputs(plan)
    assert before.keys() == {"student, config.json", "student, model.safetensors", "student, tokenizer"}
    change_template(student)
    change_weight(student)
    after = student_inputs(plan)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"student, model.safetensors", "student, tokenizer"}


def test_a_finished_run_of_other_text_is_not_returned_as_this_one(
    mapping: Path, texts: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(mapping, run)
    assert train(mapping, run).was_finished
    texts[0].write_text(texts[0].read_text().replace("fox", "cat"))
    for resume in (False, True):
        text = refusal(mapping, run, resume=resume)
        assert "the finished run in the output folder was made from other inputs" in text
        assert "training text" in text


def test_a_folder_without_recorded_inputs_is_refused(mapping: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop(mapping, run)
    plan = json.loads((run / "plan.json").read_text())
    del plan["made_from"]
    (run / "plan.json").write_text(json.dumps(plan))
    assert "does not record what the run was made from" in refusal(mapping, run)
    assert main(["train", str(mapping), "--output", str(run), "--resume"]) == 2
