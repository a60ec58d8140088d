"""`xarch-kd train`: run a mapping file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    mapping: Annotated[Path, typer.Argument(help="Mapping file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Run folder: new, or one that this file's run was started in.")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Resume the unfinished run in that folder.")] = False,
    control: Annotated[
        Literal["unchanged", "shuffled"] | None,
        typer.Option(help="Run a control instead: the unconverted teacher, or the teacher's features of other rows."),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors only; figures are in events.jsonl.")
    ] = False,
) -> None:
    """Run every stage of a mapping file, save the student and evaluate it against its teacher.

    Ctrl-C and SIGTERM finish the current step, write a checkpoint and exit with 130; --resume resumes from it. A
    finished run is not changed. On several devices or machines:

    python -m torch.distributed.run --nproc-per-node 2 -m xarch_kd train mapping.yaml --output runs/first

    splits the rows of each micro-batch over the processes; batch_size stays that of the whole micro-batch.
    """
    from xarch_kd.mapping_file.read import read_mapping_text

    # Errors of the file are reported before the slow imports: of the schema, then of the model libraries.
    read_mapping_text(mapping)
    from xarch_kd.mapping_file.load import load_mapping

    load_mapping(mapping)
    # torch would print on every rank that no parameter was unused; it reads this when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from xarch_kd.cli.console import make_console, quiet_libraries

    quiet_libraries()
    from xarch_kd.job.train import train
    from xarch_kd.planning.resolve import make_plan

    # Of several processes (torch.distributed.run) rank 0 prints.
    console = make_console(quiet=quiet or os.environ.get("RANK", "0") != "0")
    run = train(make_plan(mapping, control=control), output, resume=resume, console=console)
    outcome = "finished before; nothing was done" if run.was_finished else "finished"
    console.print(f"{outcome}: {run.student}", soft_wrap=True)
