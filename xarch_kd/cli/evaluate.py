"""`xarch-kd evaluate`: evaluate a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, as written by `xarch-kd train`.")],
    tokens: Annotated[
        int | None, typer.Option(min=64, help="Tokens of each text; default: from the mapping file.")
    ] = None,
    gate: Annotated[
        float | None,
        typer.Option(help="Exit with 1 unless the student's held-out NLL is within this many nats of the teacher's."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Evaluate a run's student against its teacher on the same tokens and write evaluation.json.

    Reports negative log-likelihood and perplexity of both models, by position, with paired bootstrap intervals of the
    difference: on held-out text of the training corpus, and on each text under `evaluate.also`.
    """
    from xarch_kd.cli.console import make_console, quiet_libraries

    quiet_libraries()
    from xarch_kd.job.evaluate import check_gate, evaluate

    console = make_console(stderr=json)
    evaluation = evaluate(run, tokens=tokens, console=console)
    if json:
        print((run / "evaluation.json").read_text(encoding="utf-8"), end="")
    if gate is not None:
        check_gate(evaluation, gate)
