"""Bad input through the command line: what is said, the exit code, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from xarch_kd.cli.app import main
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


def refused(mapping: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Train `mapping` and return the exit code and what was said; no run folder may come of it."""
    code = main(["train", str(mapping), "--output", str(run)])
    assert not run.exists()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "fault of xarch-kd" not in error
    return code, error


@pytest.mark.parametrize(
    ("changes", "stage", "message"),
    [
        ({"seeed": 1}, {}, "seeed: unknown key. Did you mean 'seed'?"),
        ({}, {"stepps": 3}, "stages[0].stepps: unknown key. Did you mean 'steps'?"),
        ({}, {"steps": "many"}, "stages[0].steps"),
        ({"student": {"convert": {"mixer": "mamba2", "replace": [1]}, "model": "x"}}, {}, "model | config | convert"),
        ({"student": {"convert": {"mixer": "mamba2", "replace": [9]}}}, {}, "9"),
        ({}, {"align": [{**MIXER_STAGE["align"][0], "layers": [{"student": 7, "teacher": 1}]}]}, "7"),
        ({}, {"cache": {"where": "memory", "limit_gib": 1e-9}}, "cache"),
    ],
)
def test_a_mapping_file_that_does_not_fit(
    write_mapping: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    stage: dict[str, Any],
    message: str,
) -> None:
    mapping = write_mapping({**MIXER_STAGE, **stage}, **changes)
    code, error = refused(mapping, tmp_path / "run", capsys)
    assert code == 2
    assert message in error
    assert f"{mapping}:" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: &one 1\nseed: *one\n", ":1:10: the anchor &one is not allowed"),
        ("version: !!python/object/apply:os.system ['true']\n", "tag"),
        ("a: " + "[" * 500_000 + "]" * 500_000 + "\n", ":1:"),
        ("a: " + "x" * (1 << 20) + "\n", "larger than 1048576 bytes"),
    ],
)
def test_yaml_that_is_more_than_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    mapping = tmp_path / "m.yaml"
    mapping.write_text(text, encoding="utf-8")
    code, error = refused(mapping, tmp_path / "run", capsys)
    assert code == 2
    assert message in error


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("harm", "message"), [(truncate, "model.safetensors"), (remote_code, "auto_map"), (no_config, "config.json")]
)
def test_a_teacher_that_is_damaged(
    write_mapping: Write,
    teacher_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    message: str,
) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    harm(folder)
    code, error = refused(write_mapping(teacher={"model": str(folder)}), tmp_path / "run", capsys)
    assert code == 3
    assert message in error


def test_a_file_that_is_no_gguf(write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model")
    code, error = refused(write_mapping(teacher={"model": str(file)}), tmp_path / "run", capsys)
    assert code == 3
    assert "is not a GGUF file" in error


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "gpt2", "gpt_neox"])
def test_a_teacher_that_no_stock_class_holds(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str
) -> None:
    folder = tmp_path / "teacher"
    tiny_model(model_type).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    code, error = refused(write_mapping(teacher={"model": str(folder)}), tmp_path / "run", capsys)
    assert code == 3
    assert model_type in error
    assert "fix:" in error


def test_a_vocabulary_of_equal_size_in_another_order(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "student"
    tiny_model("mamba2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    mapping = write_mapping({**LOGIT_STAGE, "train": ["all"]}, student={"model": str(folder)})
    code, error = refused(mapping, tmp_path / "run", capsys)
    assert code == 3
    assert "token" in error
    assert "'a'" in error or "'b'" in error


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_tracking_without_its_package(
    write_mapping: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, error = refused(write_mapping(tracking=[package]), tmp_path / "run", capsys)
    assert code == 2
    assert f"pip install {package}" in error


def test_an_output_that_holds_something_else(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert main(["train", str(write_mapping()), "--output", str(other)]) == 2
    assert "holds something else than a run" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_a_mapping_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = refused(tmp_path / "absent.yaml", tmp_path / "run", capsys)
    assert code == 2
    assert "absent.yaml" in error


def test_the_run_goes_on_with_the_mapping_file_it_was_started_with(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping, run = write_mapping(MIXER_STAGE), tmp_path / "run"
    assert main(["train", str(mapping), "--output", str(run)]) == 0
    other = yaml.safe_load(mapping.read_text())
    other["seed"] = 5
    mapping.write_text(yaml.safe_dump(other))
    assert main(["train", str(mapping), "--output", str(run), "--resume"]) == 2
    assert "holds the run of another mapping file" in capsys.readouterr().err
