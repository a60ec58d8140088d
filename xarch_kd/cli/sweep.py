"""`xarch-kd sweep`: train a grid of settings and seeds, and compare the runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def command(
    mapping: Annotated[Path, typer.Argument(help="Mapping file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the sweep: one run folder per combination.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE,…", help="Values of one key; may be given several times."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per combination, from the file's own.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Train a mapping file once for every combination of values and seeds, and compare the runs.

    Keys are paths in the file, with numbers for items of lists: stages.0.optimizer.lr, stages.0.align.0.layers. All
    combinations are checked before the first one trains. Repeat the command to resume it: finished runs are kept.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from xarch_kd.cli.console import make_console, quiet_libraries

    quiet_libraries()
    from xarch_kd.errors import UsageError
    from xarch_kd.job.sweep import parse_setting, sweep

    parsed = [parse_setting(text) for text in settings or ()]
    given = dict(parsed)
    if len(given) < len(parsed):
        raise UsageError(
            "A key is set twice.", asked=", ".join(key for key, _ in parsed), fix="give all values at once"
        )
    sweep(mapping, output, settings=given, seeds=seeds, console=make_console(quiet=quiet))
