"""The command line itself: table of commands, help, exit codes, error messages."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperCommand

import xarch_kd as package
from tests.cli.conftest import XarchKd
from xarch_kd import errors
from xarch_kd.cli import app

CLI = Path(app.__file__).parent


@pytest.fixture
def doing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Replace the code of `xarch-kd doctor`."""

    def become(action: Callable[[], Any]) -> None:
        def load(name: str) -> TyperCommand:
            replaced = typer.Typer(add_completion=False, rich_markup_mode=None)
            replaced.command(name)(action)
            command = typer.main.get_command(replaced)
            assert isinstance(command, TyperCommand)
            return command

        monkeypatch.setattr(app, "load_command", load)

    return become


def test_the_table_equals_the_files() -> None:
    files = {path.stem for path in CLI.glob("*.py") if path.stem not in ("__init__", "app")}
    with_command = {
        name
        for name in files
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "command"
            for node in ast.parse((CLI / f"{name}.py").read_text()).body
        )
    }
    assert set(app.COMMANDS) == with_command


def test_help_has_one_line_a_command_and_examples(xarch_kd: XarchKd) -> None:
    done = xarch_kd("--help")
    assert done.code == 0
    lines = done.out.splitlines()
    for name, entry in app.COMMANDS.items():
        assert [line for line in lines if line.split()[:1] == [name]] == [f"  {name:<8}  {entry.summary}"]
        assert f"    {entry.examples[0]}" in lines


@pytest.mark.parametrize("name", list(app.COMMANDS))
def test_each_command_has_help_with_its_examples(name: str, xarch_kd: XarchKd) -> None:
    done = xarch_kd(name, "--help")
    assert done.code == 0
    assert done.out.startswith(f"Usage: xarch-kd {name}")
    for example in app.COMMANDS[name].examples:
        assert f"    {example}" in done.out.splitlines()


@pytest.mark.parametrize("name", list(app.COMMANDS))
def test_examples_parse(name: str) -> None:
    import shlex

    command = app.load_command(name)
    for example in app.COMMANDS[name].examples:
        program, called, *arguments = shlex.split(example)
        assert (program, called) == ("xarch-kd", name)
        command.make_context(name, arguments)


def test_no_arguments_is_help(xarch_kd: XarchKd) -> None:
    assert xarch_kd() == xarch_kd("--help")


def test_version(xarch_kd: XarchKd) -> None:
    assert xarch_kd("--version") == (0, f"xarch-kd {package.__version__}\n", "")


def test_unknown_command_names_the_nearest(xarch_kd: XarchKd) -> None:
    done = xarch_kd("trian")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[0] == "error: No such command 'trian'. Did you mean 'train'?"


def test_unknown_option_is_a_usage_error(xarch_kd: XarchKd) -> None:
    done = xarch_kd("doctor", "--jsn")
    assert done.code == 2
    assert done.err.startswith("error: No such option: --jsn")
    assert "Try 'xarch-kd doctor --help'." in done.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.GateFailed("the gap is too large"), 1),
        (errors.UsageError("no"), 2),
        (errors.MappingFileError(["file.yaml:1:1: no"]), 2),
        (errors.ModelError("no"), 3),
        (errors.ConversionError("no"), 3),
        (errors.TapError("no"), 3),
        (errors.DataError("no"), 3),
        (errors.NonFiniteLoss("no"), 3),
        (errors.CheckpointError("no"), 3),
        (OSError(28, "No space left on device"), 3),
    ],
)
def test_errors_are_plain_and_have_their_exit_code(
    error: Exception, code: int, doing: Callable[[Callable[[], Any]], None], xarch_kd: XarchKd
) -> None:
    def fail() -> None:
        raise error

    doing(fail)
    assert xarch_kd("doctor") == (code, "", f"error: {error}\n")


@pytest.mark.parametrize("stop", [errors.Interrupted("stopped at step 3"), KeyboardInterrupt(), typer.Abort()])
def test_being_stopped_is_130(
    stop: BaseException, doing: Callable[[Callable[[], Any]], None], xarch_kd: XarchKd
) -> None:
    def fail() -> None:
        raise stop

    doing(fail)
    done = xarch_kd("doctor")
    assert done.code == 130
    assert "error" not in done.err


@pytest.mark.parametrize("arguments", [("--debug", "doctor"), ("doctor", "--debug")])
def test_debug_shows_the_traceback(
    arguments: tuple[str, ...], doing: Callable[[Callable[[], Any]], None], xarch_kd: XarchKd
) -> None:
    def fail() -> None:
        raise errors.DataError("the text is empty")

    doing(fail)
    done = xarch_kd(*arguments)
    assert done.code == 3
    assert done.err.startswith("Traceback (most recent call last)")
    assert done.err.endswith("error: the text is empty\n")


def test_a_bug_is_reported_as_one(doing: Callable[[Callable[[], Any]], None], xarch_kd: XarchKd) -> None:
    def fail() -> None:
        raise KeyError("blocks")

    doing(fail)
    done = xarch_kd("doctor")
    assert (done.code, done.err.splitlines()) == (
        3,
        ["error: KeyError: 'blocks'", "This is a bug in xarch-kd. Rerun with --debug and report it."],
    )


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_plain_line(doing: Callable[[Callable[[], Any]], None], xarch_kd: XarchKd) -> None:
    doing(lambda: warnings.warn("nothing attends", stacklevel=1))
    assert xarch_kd("doctor") == (0, "", "warning: nothing attends\n")


def test_the_exit_code_of_a_command_is_returned(doing: Callable[[Callable[[], Any]], None], xarch_kd: XarchKd) -> None:
    def leave() -> None:
        raise typer.Exit(1)

    doing(leave)
    assert xarch_kd("doctor").code == 1
