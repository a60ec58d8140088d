"""`xarch-kd export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import XarchKd
from xarch_kd.models.conversion.convert import convert
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a student in bfloat16."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model("bamba", rms_norm_eps=1e-5).bfloat16().save_pretrained(folder / "student")
    tiny_tokenizer().save_pretrained(folder / "student")
    return folder


def test_there_and_back(student: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    done = xarch_kd("export", student, "--output", there)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{there}: MambaLMHeadModel of mamba_ssm, ")
    assert (there / "pytorch_model.bin").is_file()
    done = xarch_kd("export", there, "--format", "transformers", "--output", back)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{back}: BambaForCausalLM, ")
    own, came = (AutoModelForCausalLM.from_pretrained(path) for path in (student / "student", back))
    assert came.dtype == torch.bfloat16
    expected = own.state_dict()
    assert [name for name, value in came.state_dict().items() if not value.equal(expected[name])] == []
    for folder in (there, back):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]


def test_a_folder_without_a_tokenizer(tmp_path: Path, xarch_kd: XarchKd) -> None:
    tiny_model("mamba").save_pretrained(tmp_path / "student")
    done = xarch_kd("export", tmp_path / "student", "--format", "mamba_ssm", "--output", tmp_path / "there")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(", no tokenizer\n")


@pytest.mark.parametrize("command", ["transformers", "mamba_ssm"])
def test_the_format_that_it_has(command: str, student: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    folder = student / "student"
    if command == "mamba_ssm":
        folder = tmp_path / "there"
        assert xarch_kd("export", student, "--output", folder).code == 0
    done = xarch_kd("export", folder, "--format", command, "--output", tmp_path / "again")
    assert done.code == 2
    assert f"is in the format of {command} already" in done.err
    assert not (tmp_path / "again").exists()


def test_what_the_format_cannot_hold(teacher: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("export", teacher, "--output", tmp_path / "there")
    assert done.code == 3
    assert "llama" in done.err and "mixer: mamba2" in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_holds_something_is_left_alone(student: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = xarch_kd("export", student, "--output", tmp_path)
    assert done.code == 2
    assert "is not an empty folder" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_student_that_is_not_there(tmp_path: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("export", tmp_path / "none", "--output", tmp_path / "there")
    assert done.code == 3
    assert "no such folder" in done.err


def test_one_file_for_llama_cpp(teacher: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    tiny_model("mamba2").bfloat16().save_pretrained(tmp_path / "student")
    file = tmp_path / "student.gguf"
    done = xarch_kd("export", tmp_path / "student", "--format", "gguf", "--output", file)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{file}: mamba2 of llama.cpp in BF16, ") and done.out.endswith(", no tokenizer\n")
    assert file.read_bytes()[:4] == b"GGUF"
    done = xarch_kd("export", tmp_path / "student", "--format", "gguf", "--dtype", "q8_0", "--output", file)
    assert done.code == 2 and f"{file} exists" in done.err
    # The teacher's tokenizer is a table of words.
    done = xarch_kd("export", teacher, "--format", "gguf", "--output", tmp_path / "teacher.gguf")
    assert done.code == 3 and "WordLevel" in done.err


def test_a_class_without_an_architecture(student: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("export", student, "--format", "gguf", "--output", tmp_path / "student.gguf")
    assert done.code == 3
    assert "llama.cpp has no architecture for a model of type bamba" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_type_for_another_format(student: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("export", student, "--dtype", "f16", "--output", tmp_path / "there")
    assert done.code == 2
    assert "--dtype is for --format gguf" in done.err


@pytest.mark.parametrize("format", ["mamba_ssm", "gguf"])
def test_a_run_without_a_student(tmp_path: Path, format: str, xarch_kd: XarchKd) -> None:
    (tmp_path / "plan.json").write_text("{}")
    done = xarch_kd("export", tmp_path, "--format", format, "--output", tmp_path / "there")
    assert done.code == 3
    assert f"The run {tmp_path} is not finished: it has no student yet." in done.err and "--resume" in done.err


def test_the_layer_names_that_servers_expect(tmp_path: Path, xarch_kd: XarchKd) -> None:
    convert(tiny_model("llama"), replace=[0, 2], check=False).save_pretrained(tmp_path / "student")
    output = tmp_path / "renamed"
    options = ["--format", "transformers", "--layer-names", "attention-mamba", "--output", output]
    done = xarch_kd("export", tmp_path / "student", *options)
    assert done.code == 0, done.err
    assert json.loads((output / "config.json").read_text())["layer_types"] == ["mamba", "attention", "mamba"]
    own, renamed = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "student", output))
    assert own.config.layer_types == renamed.config.layer_types
    ids = torch.arange(1, 12)[None]
    assert own(ids, use_cache=False).logits.equal(renamed(ids, use_cache=False).logits)


def test_layer_names_that_a_class_or_a_format_does_not_have(student: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    names = ["--layer-names", "attention-mamba", "--output", tmp_path / "there"]
    done = xarch_kd("export", student, "--format", "transformers", *names)
    assert done.code == 3 and "no other layer names for a model of type bamba" in done.err
    done = xarch_kd("export", student, *names)
    assert done.code == 2 and "add --format transformers" in done.err
    assert not (tmp_path / "there").exists()
