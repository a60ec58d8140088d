"""`xarch-kd compare`: compare runs that were evaluated alike."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from xarch_kd.errors import UsageError


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, each evaluated on the same text and settings.")],
    sort: Annotated[
        str | None, typer.Option(metavar="MEASURE", help="Order of the runs, e.g. seconds; default: as given.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all measures and differences as JSON.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print all measures as CSV, one line per run.")] = False,
) -> None:
    """Compare runs: quality beside tokens, FLOPs, seconds and peak memory, and paired differences with intervals.

    Runs whose evaluations differ in text, suites or settings are refused, with the fields that differ. A difference is
    real if its p-value, adjusted for all pairs, is below 0.05.
    """
    if json and csv:
        raise UsageError("--json and --csv are two formats of one output.", fix="give one of them")
    from xarch_kd.cli.console import make_console
    from xarch_kd.report.compare import compare

    comparison = compare(runs)
    if sort is not None:
        comparison = comparison.sorted_by(sort)
    if json:
        print(json_format.dumps(comparison.as_dict(), indent=2))
    elif csv:
        print(comparison.as_csv(), end="")
    else:
        from xarch_kd.report.compared_page import render_comparison

        make_console().print(render_comparison(comparison))
