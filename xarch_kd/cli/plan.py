"""`xarch-kd plan`: check a mapping file and print the resolved run."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer


def command(
    mapping: Annotated[Path, typer.Argument(help="Mapping file, YAML.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Load both models and run calibration, on which cka, monotone, … depend."),
    ] = False,
) -> None:
    """Check a mapping file against both models' configs and print the resolved run; no weights are read.

    Prints the models, their layers, each pair with its shapes, the trained parameters, tokens, memory and time. All
    problems of the file are reported at once with line and column. Layer maps that depend on data need --calibrate.
    """
    from xarch_kd.mapping_file.read import read_mapping_text

    # Errors of the file are reported before the slow imports: of the schema, then of the model libraries.
    read_mapping_text(mapping)
    from xarch_kd.mapping_file.load import load_mapping

    load_mapping(mapping)
    # A calibration pass makes garbage.
    with nullcontext() if calibrate else _no_collection():
        _plan(mapping, as_json=as_json, calibrate=calibrate)


def _plan(mapping: Path, *, as_json: bool, calibrate: bool) -> None:
    from xarch_kd.cli.console import make_console
    from xarch_kd.planning.render import plan_as_dict, render_plan
    from xarch_kd.planning.resolve import make_plan

    plan = make_plan(mapping)
    if calibrate:
        from xarch_kd.job.calibrate import calibrate as run_calibration
        from xarch_kd.run.report import Reporter

        plan = run_calibration(plan, Reporter(make_console(stderr=True)))
    if as_json:
        print(json.dumps(plan_as_dict(plan), indent=2))
        return
    # Tables are as wide as the terminal; in a pipe or a file they are not cut.
    make_console(plain_width=200).print(render_plan(plan))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause garbage collection, which takes a fifth of the time of importing thousands of modules and frees nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
