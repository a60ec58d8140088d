"""Text of paths, mapping files and models is shown literally: no markup, no control characters."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from xarch_kd.cli.app import main
from xarch_kd.cli.console import PlainConsole
from xarch_kd.display import AsIs, as_html, as_text
from xarch_kd.errors import UsageError, printable
from xarch_kd.job.run import Run
from xarch_kd.run.report import Reporter
from xarch_kd.testing.examples import write_example_files

WRONG = "[bold]z[/x] :smile: \x1b[2J\x9b1m\u202eabc\udcff"
SHOWN = "[bold]z[/x] :smile: \\x1b[2J\\x9b1m\\u202eabc\\udcff"


def table() -> Table:
    made = Table()
    made.add_column(WRONG)
    made.add_row(WRONG)
    return made


def test_control_characters_are_shown_and_text_is_kept() -> None:
    assert printable(WRONG) == SHOWN
    assert printable("größer\t→ 日本\n") == "größer\t→ 日本\n"
    assert str(UsageError(WRONG, asked=WRONG, fix=WRONG)) == f"{SHOWN}\n  asked:   {SHOWN}\n  fix:     {SHOWN}"


@pytest.mark.parametrize("terminal", [False, True])
def test_every_way_to_print_is_literal(terminal: bool) -> None:
    for kind in (Console, PlainConsole):
        stream = io.StringIO()
        console = kind(file=stream, width=200, force_terminal=terminal, color_system=None, emoji=False)
        reporter = Reporter(console)
        reporter.line(WRONG)
        reporter.show(table())
        if isinstance(console, PlainConsole):
            console.print(WRONG, table())
        written = stream.getvalue()
        assert written.count(SHOWN) == 3 if kind is Console else 6
        assert "\x1b[2J" not in written and "\x9b" not in written
    assert as_text(table(), more="").count(SHOWN) == 2
    assert "[bold]z[/x]" in as_html(AsIs(table()))


def test_a_run_folder_with_markup_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_example_files()
    run = "runs/[bold]z[/x]\x1b[2J"
    assert main(["train", "mapping.yaml", "--output", run]) == 0
    assert main(["train", "mapping.yaml", "--output", run]) == 0
    assert main(["evaluate", run, "--tokens", "64"]) == 0
    assert main(["show", run, "--prompt", "[bold]z[/x]", "--tokens", "2"]) == 0
    assert main(["plan", f"{run}/mapping.yaml"]) == 0
    assert main(["train", "mapping.yaml", "--output", f"{run}/mapping.yaml"]) == 2
    captured = capsys.readouterr()
    for written in (captured.out, captured.err):
        assert "runs/[bold]z[/x]\\x1b[2J" in written.replace("\n", "")
        assert "\x1b" not in written
    Console(file=io.StringIO(), width=200).print(Run(run))
    with pytest.raises(UsageError):
        Run("runs/[bold]other[/x]")
