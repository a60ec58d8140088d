"""`xarch-kd report`: write the report of a run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xarch_kd.errors import printable


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, as written by `xarch-kd train`; finished or not.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: report.html in the run folder.")
    ] = None,
) -> None:
    """Write a run's report: verdict, plan, curves, evaluation, cost and signatures on one page.

    The page loads nothing, runs no scripts, and can be sent as it is. Every run writes one when it ends.
    """
    from xarch_kd.report.page import write_report

    print(printable(f"wrote {write_report(run, output)}"))
