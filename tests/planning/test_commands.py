"""`xarch-kd plan` and `xarch-kd init` as a user calls them: text, exit codes, files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xarch_kd.cli.app import main

FolderOf = Callable[..., str]


def test_init_then_plan(folder_of: FolderOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, file = folder_of("llama", num_hidden_layers=4), tmp_path / "mapping.yaml"
    assert main(["init", teacher, "--mixer", "mamba2", "--keep-attention", "every 4", "--output", str(file)]) == 0
    assert capsys.readouterr().out == f"wrote {file}; next: xarch-kd plan {file}\n"
    assert main(["plan", str(file)]) == 0
    assert "mixer-output.0" in capsys.readouterr().out
    assert main(["plan", str(file), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [row["mixer"] for row in plan["student"]["layers"]] == ["mamba2", "mamba2", "mamba2", "attention"]
    assert main(["init", teacher, "--output", str(file)]) == 2
    assert "exists and is left as it is" in capsys.readouterr().err


def test_init_prints_when_no_file_is_named(folder_of: FolderOf, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", folder_of("llama"), "--keep-attention", "first 1"]) == 0
    assert capsys.readouterr().out.startswith("version: 1\nteacher:\n")


@pytest.mark.parametrize(
    ("old", "new", "message", "code"),
    [
        ("seed: 0", "sede: 0", "map.yaml:13:1: sede: unknown key. Did you mean 'seed'?", 2),
        ("steps: 4", "steps: four", "stages[0].steps: must be a whole number, found 'four'", 2),
        ("student:\n", "student:\n  model: x\n", "exactly one of model | config | convert must be given", 2),
        ("every 2", "[0, 9]", "keep_attention names block 9, but the model has 3 blocks", 2),
        ("seed: 0", "seed: &a 0", "the anchor &a is not allowed", 2),
        ("seed: 0", "seed: !!int 0", "the tag tag:yaml.org,2002:int is not allowed", 2),
        ("seed: 0", "seed: " + "[" * 500_000, "nested deeper than 20 levels", 2),
        ("./teacher", "./no-such/teacher/here", "There is no such model folder or file", 3),
    ],
)
def test_faults_and_exit_codes(
    old: str, new: str, message: str, code: int, good: str, folder_of: FolderOf, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "map.yaml"
    text = good.replace(old, new, 1)
    file.write_text(text.replace("./teacher", folder_of("llama", num_hidden_layers=3)))
    assert main(["plan", str(file)]) == code
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""
    assert "Traceback" not in shown.err


def test_a_teacher_that_does_not_convert(
    good: str, folder_of: FolderOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "map.yaml"
    file.write_text(good.replace("./teacher", folder_of("qwen3")))
    assert main(["plan", str(file)]) == 3
    shown = capsys.readouterr().err
    assert "map.yaml:7:5: student.convert: A teacher of type qwen3 cannot become granitemoehybrid or bamba" in shown


@pytest.mark.parametrize("arguments", [["plan"], ["train", "--output", "run"]])
@pytest.mark.parametrize(("text", "message"), [("version: 2\n", "must be the number 1"), (None, "no such file")])
def test_a_faulty_or_missing_file_is_refused_before_torch_is_loaded(
    tmp_path: Path, arguments: list[str], text: str | None, message: str
) -> None:
    file = tmp_path / "map.yaml"
    if text is not None:
        file.write_text(text)
    code = (
        "import sys\nfrom xarch_kd.cli.app import main\n"
        f"code = main({[*arguments, str(file)]!r})\n"
        "print(code, sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "2 []\n"
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["map.yaml"] * (text is not None)
