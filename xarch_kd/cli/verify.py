"""`xarch-kd verify`: compare the files of a run or a student with their hashes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from xarch_kd.cli.console import make_console
from xarch_kd.errors import CheckpointError
from xarch_kd.run.integrity import verify_folder

SHOWN: int = 5


def command(
    folder: Annotated[Path, typer.Argument(metavar="RUN|STUDENT", help="Run folder, or the folder of a student.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Compare every file of a run or of a student with the SHA-256 that was written with it; nothing is changed.

    Of an unfinished run, finished stages and checkpoints are compared. Exits with 3 if a file is damaged or missing.
    """
    found = verify_folder(folder)
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "folder": str(folder)}, indent=2))
    else:
        console = make_console()
        lines = [f"{folder}: {found.kind}, {found.compared:,} files compared, {len(found.damage):,} damaged"]
        if found.resumes_from is not None:
            lines.append(f"  --resume continues from {found.resumes_from}")
        if found.unlisted:
            rest = f" and {len(found.unlisted) - SHOWN:,} more" if len(found.unlisted) > SHOWN else ""
            lines.append(f"  without a hash: {', '.join(found.unlisted[:SHOWN])}{rest}")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if found.damage:
        raise CheckpointError(
            f"{len(found.damage):,} files are not what was written",
            asked=folder,
            found="\n           ".join(found.damage),
            fix="restore them from a copy"
            + (
                "; --resume uses the newest whole checkpoint"
                if found.kind == "unfinished run"
                else ", or train again with another --output"
            ),
        )
