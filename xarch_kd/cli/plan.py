"""`xarch-kd plan`: check a mapping file and show what it would do."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def command(
    mapping: Annotated[Path, typer.Argument(help="The mapping file, YAML.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Load both models and run the pass that cka, monotone, … follow from."),
    ] = False,
) -> None:
    """Check a mapping file against both models' configs and show what it would do; no weights are read.

    The models, their blocks, each pair with its shapes, what trains, tokens, memory and time are shown. Every problem
    of the file is told at once with its line and column. Layer maps that follow from data are shown with --calibrate.
    """
    from xarch_kd.mapping_file.load import load_mapping

    # A file with a fault is refused before the libraries that models need are loaded.
    load_mapping(mapping)
    with _no_collection():
        from xarch_kd.planning.render import plan_as_dict, render_plan
        from xarch_kd.planning.resolve import make_plan

        plan = make_plan(mapping)
    if calibrate:
        from xarch_kd.job.calibrate import calibrate as run_calibration

        plan = run_calibration(plan, lambda text: print(text, file=sys.stderr))
    if as_json:
        print(json.dumps(plan_as_dict(plan), indent=2))
        return
    from rich.console import Console

    # Tables are cut to the terminal; in a pipe or a file they keep their width.
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(render_plan(plan), highlight=False)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause garbage collection: importing thousands of modules makes no garbage; looking for it takes a fifth."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
