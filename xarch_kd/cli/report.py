"""`xarch-kd report`: write the report of runs as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xarch_kd.errors import UsageError, printable


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, as written by `xarch-kd train`; finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. Default for one run: report.html in its folder."),
    ] = None,
) -> None:
    """Write a run's report: verdict, plan, curves, evaluation, cost and signatures on one page.

    The page loads nothing, runs no scripts, and can be sent as it is. Every run writes one when it ends. Several runs
    are compared, as `xarch-kd compare` does.
    """
    if len(runs) == 1:
        from xarch_kd.report.page import write_report

        print(printable(f"wrote {write_report(runs[0], output)}"))
        return
    if output is None:
        raise UsageError("The report of several runs belongs to none of their folders.", fix="--output compared.html")
    from xarch_kd.report.compared_page import write_comparison

    print(printable(f"wrote {write_comparison(runs, output)}"))
