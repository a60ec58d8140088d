"""`xarch-kd convert`: convert a Transformer into an untrained hybrid checkpoint of a stock class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from xarch_kd.errors import UsageError, printable, renamed
from xarch_kd.mapping_file.mixer_sizes import Mamba2Options
from xarch_kd.mapping_file.schema import MixerName, TargetName


def command(
    teacher: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or package:NAME/FILE.gguf.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")],
    mixer: Annotated[MixerName, typer.Option(help="Mixer that replaces attention.")] = "mamba2",
    target: Annotated[
        TargetName,
        typer.Option(help="The student's class; auto: the stock class that fits best."),
    ] = "auto",
    keep_attention: Annotated[
        str | None,
        typer.Option(
            help='Layers that keep attention: "every N", "first N", "last N", "none", "all", or a list 0,4,8.'
        ),
    ] = None,
    replace: Annotated[str | None, typer.Option(help="Layers whose attention is replaced, in the same form.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="With --mixer window: the number of last tokens that a token attends to.")
    ] = None,
    sinks: Annotated[
        int, typer.Option(min=0, help="With --mixer window: the number of first tokens that stay visible.")
    ] = 0,
    expand: Annotated[
        int | None, typer.Option(min=1, help="With --mixer mamba2: its channels by the hidden size; llama.cpp needs 2.")
    ] = None,
    proj_bias: Annotated[
        bool, typer.Option(help="With --mixer mamba2: biases of its projections; llama.cpp needs none.")
    ] = True,
    n_groups: Annotated[
        int | None, typer.Option(min=1, help="With --mixer mamba2: groups of heads that share B and C; mlx-lm needs 1.")
    ] = None,
    init: Annotated[
        Literal["attention", "random"], typer.Option(help="Initialization of the new mixers.")
    ] = "attention",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random initialization.")] = 0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Dtype of the student.")] = "float32",
    initialisation: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Convert a Transformer into a hybrid checkpoint of a stock class, with new, untrained mixers."""
    _check(output, keep_attention, replace, initialisation)
    sizes = Mamba2Options(expand=expand, proj_bias=proj_bias, n_groups=n_groups)

    from xarch_kd.cli.console import make_console, quiet_libraries

    quiet_libraries()
    import torch

    from xarch_kd.job.models import load_weights
    from xarch_kd.models.conversion.convert import convert
    from xarch_kd.models.loading.load import load_tokenizer
    from xarch_kd.models.loading.save import save_student
    from xarch_kd.run.report import Reporter

    reporter = Reporter(make_console(stderr=True))
    loaded = load_weights(teacher, reporter, revision=revision)
    with reporter.work("converting", 3, "steps") as work:
        student = convert(
            loaded,
            mixer=mixer,
            target=target,
            keep_attention=selection(keep_attention),
            replace=selection(replace),
            window=window,
            sinks=sinks,
            mamba2=sizes.model_dump(exclude_defaults=True) or None,
            init=init,
            seed=seed,
            dtype=getattr(torch, dtype),
            progress=work.at,
        )
    save_student(student, load_tokenizer(teacher, revision), output)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    print(printable(f"{output}: {type(student).__name__}, {parameters:,} parameters, untrained"))


def _check(output: Path, keep_attention: str | None, replace: str | None, initialisation: str | None) -> None:
    """Raise UsageError for options that exclude each other, and for a folder that holds something."""
    if initialisation is not None:
        raise UsageError(
            renamed("--initialisation", "--init", kind="option"), asked=initialisation, fix=f"--init {initialisation}"
        )
    if (keep_attention is None) == (replace is None):
        raise UsageError(
            "Exactly one of --keep-attention and --replace must be given.",
            found="neither" if replace is None else "both",
            fix='e.g. --keep-attention "every 4", or --replace 6,13,20,27',
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty folder.", fix="give a new folder as --output")


def selection(text: str | None) -> str | list[int] | None:
    """Return `0,4,8` as a list of layers and any other text as it is, for `kept_layers` to parse."""
    if text is not None and re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        return [int(part) for part in text.split(",")]
    return text
