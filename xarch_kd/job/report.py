"""Report at the end of a run."""

from __future__ import annotations

import shlex
from pathlib import Path

from xarch_kd.run.folder import RunFolder
from xarch_kd.run.report import Reporter


def report_at_end(folder: RunFolder, reporter: Reporter) -> None:
    """Write the report of a run that is finished; one that fails is a warning, with the command that repeats it."""
    try:
        reporter.line(f"report: {written(folder.root)}")
    except Exception as error:
        again = shlex.join(["xarch-kd", "report", str(folder.root)])
        reporter.line(f"warning: no report was written: {type(error).__name__}: {error}; repeat it: {again}")


def written(root: Path) -> Path:
    """Write the report and return its path; what draws it is imported only here."""
    from xarch_kd.report.page import write_report

    return write_report(root)
