"""`xarch-kd evaluate`: evaluate a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from xarch_kd.errors import UsageError

if TYPE_CHECKING:
    from xarch_kd.mapping_file.schema import EvaluationSize


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, as written by `xarch-kd train`.")],
    suites: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="e.g. likelihood,exposure,generation,diversity,long_range,speed; default: from the mapping file.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=64, help="Tokens of each text, and those that a model writes; default: from the mapping file."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="quick or standard: prompts and tokens of the suites that sample.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,…", help="Context lengths of the suite speed, in tokens.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Time for the suite speed; 0 measures bytes alone. Default with --suites: 300."),
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option("--memory-gib", help="Memory of the largest batch of the suite speed.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of both models in the suite speed.")] = None,
    gate: Annotated[
        float | None,
        typer.Option(help="Exit with 1 unless the student's held-out NLL is within this many nats of the teacher's."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Evaluate a run's student against its teacher and write evaluation.json.

    The suite likelihood reports negative log-likelihood and perplexity of both models on the same tokens, by position,
    with paired bootstrap intervals of the difference: on held-out text of the training corpus, and on each text under
    `evaluate.also`. The suite exposure reports how much more the student errs on text that it wrote itself than on its
    teacher's, generation the same questions by likelihood and by writing, diversity how different from each other the
    texts of each model are, long_range how well each finds again what it read. The suite speed reports
    bytes of cache, times of prefill and decoding, and peak memory by context length. Figures of a suite that is not
    named stay as they were measured before.
    """
    from xarch_kd.cli.console import make_console, quiet_libraries

    quiet_libraries()
    from xarch_kd.job.evaluate import check_gate, evaluate

    given = {"lengths": _numbers(lengths), "seconds": seconds, "memory_gib": memory_gib, "dtype": dtype}
    console = make_console(stderr=json)
    evaluation = evaluate(
        run,
        suites=None if suites is None else [name.strip() for name in suites.split(",") if name.strip()],
        tokens=tokens,
        size=cast("EvaluationSize | None", size),  # checked there
        speed={name: value for name, value in given.items() if value is not None},
        console=console,
    )
    if json:
        print((run / "evaluation.json").read_text(encoding="utf-8"), end="")
    if gate is not None:
        check_gate(evaluation, gate)


def _numbers(text: str | None) -> tuple[int, ...] | None:
    """Return the whole numbers of a list with commas. Raises UsageError."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            "Context lengths are whole numbers with commas between them.", asked=f"--lengths {text}", fix="256,1024"
        ) from None
