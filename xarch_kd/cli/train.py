"""`xarch-kd train`: run a mapping file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    mapping: Annotated[Path, typer.Argument(help="Mapping file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Run folder: new, or one that this file's run was started in.")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run in that folder.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but errors; figures go to events.jsonl.")
    ] = False,
) -> None:
    """Run every stage of a mapping file, save the student, measure it against its teacher.

    Ctrl-C and SIGTERM end the step in progress, write a checkpoint and exit with 130; --resume goes on from there. A
    finished run is left as it is.
    """
    from xarch_kd.cli.console import make_console, quiet_libraries

    quiet_libraries()
    from xarch_kd.job.train import train
    from xarch_kd.planning.resolve import make_plan

    console = make_console(quiet=quiet)
    run = train(make_plan(mapping), output, resume=resume, console=console)
    said = "finished before; nothing was done" if run.was_finished else "finished"
    console.print(f"{said}: {run.student}", highlight=False, soft_wrap=True)
