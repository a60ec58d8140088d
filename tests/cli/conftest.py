"""A tiny teacher on disk, and the command line as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from xarch_kd.cli.app import main
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


class Done(NamedTuple):
    """Exit code and printed text of a command."""

    code: int
    out: str
    err: str


XarchKd = Callable[..., Done]


@pytest.fixture
def xarch_kd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> XarchKd:
    """`xarch_kd("plan", "file.yaml")` runs the command in this process, on a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tiny_model("llama", seed=0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
