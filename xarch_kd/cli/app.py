"""Command `xarch-kd`: a table of commands, each imported from its own file when it is called.

Exit codes: 0 done, 1 a gate failed, 2 usage or mapping file, 3 data or model, 130 interrupted and resumable.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

import xarch_kd
from xarch_kd.errors import XarchError, printable
from xarch_kd.mapping_file.answers import answer


class CommandHelp(NamedTuple):
    """Help of one command: its line in `xarch-kd --help`, and the examples under its own help."""

    summary: str
    examples: tuple[str, ...]


# Command → its help. Its code is the function `command` of `xarch_kd/cli/<command>.py`.
COMMANDS: dict[str, CommandHelp] = {
    "init": CommandHelp(
        "Write a mapping file for a teacher.",
        ('xarch-kd init ./teacher --mixer mamba2 --keep-attention "every 4" --output mapping.yaml',),
    ),
    "plan": CommandHelp(
        "Check a mapping file and print the resolved run; reads no weights.",
        ("xarch-kd plan mapping.yaml", "xarch-kd plan mapping.yaml --json"),
    ),
    "data": CommandHelp(
        "Show what is in a mapping file's text; reads no weights.",
        ("xarch-kd data mapping.yaml", "xarch-kd data mapping.yaml --rows 5 --json"),
    ),
    "train": CommandHelp(
        "Run a mapping file: distil, save the student, evaluate it.",
        ("xarch-kd train mapping.yaml --output runs/first", "xarch-kd train mapping.yaml --output runs/first --resume"),
    ),
    "watch": CommandHelp(
        "Draw the loss curves of a running or finished run.",
        ("xarch-kd watch runs/first", "xarch-kd watch runs/first --once --stage mixers"),
    ),
    "evaluate": CommandHelp(
        "Evaluate a run's student against its teacher on the same tokens.",
        ("xarch-kd evaluate runs/first",),
    ),
    "show": CommandHelp(
        "Show a run's figures, generated text and code to load the student.",
        ("xarch-kd show runs/first", 'xarch-kd show runs/first --prompt "Once upon a time" --tokens 60'),
    ),
    "report": CommandHelp(
        "Write a run's report, or that of several runs compared, as one HTML file.",
        ("xarch-kd report runs/first", "xarch-kd report runs/first runs/second --output compared.html"),
    ),
    "compare": CommandHelp(
        "Compare runs that were evaluated alike: quality, cost, and which differences are real.",
        ("xarch-kd compare runs/first runs/second", "xarch-kd compare runs/* --sort seconds --csv"),
    ),
    "sweep": CommandHelp(
        "Train a grid of settings and seeds into one folder, and compare the runs.",
        ("xarch-kd sweep mapping.yaml --set stages.0.optimizer.lr=1e-3,3e-3 --seeds 3 --output runs/sweep",),
    ),
    "verify": CommandHelp(
        "Compare the files of a run or a student with their hashes.",
        ("xarch-kd verify runs/first", "xarch-kd verify runs/first/student --json"),
    ),
    "convert": CommandHelp(
        "Convert a Transformer into an untrained stock hybrid checkpoint.",
        ('xarch-kd convert ./teacher --mixer mamba2 --keep-attention "every 4" --output ./student',),
    ),
    "export": CommandHelp(
        "Convert a student to the format of mamba_ssm or llama.cpp, or back.",
        (
            "xarch-kd export runs/first --format mamba_ssm --output ./for-mamba-ssm",
            "xarch-kd export runs/first --format gguf --dtype q8_0 --output student.gguf",
            "xarch-kd export ./for-mamba-ssm --format transformers --output ./student",
        ),
    ),
    "inspect": CommandHelp(
        "List the taps of a model with shapes; reads no weights.",
        ("xarch-kd inspect ./teacher", "xarch-kd inspect ./teacher --json"),
    ),
    "doctor": CommandHelp(
        "Report what runs here: versions, devices, optional packages.",
        ("xarch-kd doctor", "xarch-kd doctor --json"),
    ),
}


def examples(lines: Sequence[str]) -> str:
    """Return the text under a help page; `\\b` preserves its line breaks."""
    return "\b\n" + "\n".join(["Examples:", *(f"  {line}" for line in lines)])


def load_command(name: str) -> TyperCommand:
    """Import `xarch_kd.cli.<name>` and return its function `command` as a command."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, epilog=examples(COMMANDS[name].examples))(import_module(f"xarch_kd.cli.{name}").command)
    loaded = typer.main.get_command(app)
    if not isinstance(loaded, TyperCommand):
        raise TypeError(f"xarch_kd.cli.{name}.command is not one command")
    return loaded


class LazyGroup(TyperGroup):
    """Group of commands that lists them from the table and imports only the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS else command, rest


def build_app() -> TyperGroup:
    """Return the command line without importing any command's file."""
    app = typer.Typer(
        cls=LazyGroup,
        add_completion=False,
        rich_markup_mode=None,
        epilog=examples([texts.examples[0] for texts in COMMANDS.values()]),
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )

    @app.callback()
    def callback(
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version.")
        ] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback; at any position.")] = False,
    ) -> None:
        """Distil a Hugging Face Transformer into any student stack from one mapping file."""

    group = typer.main.get_command(app)
    if not isinstance(group, LazyGroup):
        raise TypeError("typer did not build a group of the class LazyGroup")
    for name, texts in COMMANDS.items():
        group.add_command(TyperCommand(name, help=texts.summary, short_help=texts.summary))
    return group


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"xarch-kd {xarch_kd.__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (default: the process's own) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out here, since it must also hold for errors met while the rest is parsed.
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    # transformers prints a notice per missing kernel; `xarch-kd doctor` lists them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            returned = build_app().main(given or ["--help"], prog_name="xarch-kd", standalone_mode=False)
        except Exception as error:
            if debug:
                traceback.print_exc()
            return _report(error)
    return returned if isinstance(returned, int) else 0


def run() -> NoReturn:
    """Run the process's command and exit.

    After `plan` the interpreter is not torn down: freeing all that torch and transformers loaded takes a sixth of the
    command's time, and there is nothing to clean up.
    """
    code = main()
    if sys.argv[1:2] != ["plan"] or "--calibrate" in sys.argv:
        sys.exit(code)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        # As the interpreter does when it cannot flush.
        code = code or 120
    os._exit(code)


def _show_warning(message: Warning | str, *_place: object) -> None:
    # Every rank of a run on several processes meets the same ones.
    if os.environ.get("RANK", "0") == "0":
        print(printable(f"warning: {message}"), file=sys.stderr)


def _report(error: Exception) -> int:
    """Print the error to stderr as plain text and return its exit code."""
    match error:
        case XarchError():
            text, code = str(error), error.exit_code
        case typer.TyperException():
            context = getattr(error, "ctx", None)
            usage = f"\n{context.get_usage()}\nTry '{context.command_path} --help'." if context is not None else ""
            # An option of another tool is answered as a key of the mapping file would be.
            instead = answer(getattr(error, "option_name", ""))
            text, code = error.format_message() + (f"\nIn the mapping file: {instead}" if instead else "") + usage, 2
        case typer.Abort():
            text, code = "stopped", 130
        case OSError():
            text, code = str(error), 3
        case _:
            text = f"{type(error).__name__}: {error}\nThis is a bug in xarch-kd. Rerun with --debug and report it."
            code = 3
    rank = os.environ.get("RANK")
    label = "error" if rank is None else f"error on rank {rank}"
    print(printable(text if code == 130 else f"{label}: {text}"), file=sys.stderr)
    return code
