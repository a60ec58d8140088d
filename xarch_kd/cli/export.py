"""`xarch-kd export`: convert a student to another library's format, or back to that of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from xarch_kd.errors import ModelError, UsageError, printable
from xarch_kd.run.folder import RunFolder


def command(
    student: Annotated[Path, typer.Argument(help="Folder of a student, of a run, or in mamba_ssm's format.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")],
    format: Annotated[
        Literal["mamba_ssm", "transformers"],
        typer.Option(help="mamba_ssm: for MambaLMHeadModel.from_pretrained; transformers: the equivalent stock class."),
    ] = "mamba_ssm",
) -> None:
    """Convert a student from the format of transformers to that of mamba_ssm, or back."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty folder.", fix="give a new folder as --output")
    # Other commands take run folders, so a run folder stands for its student.
    folder = student / "student" if (student / "student" / "config.json").is_file() else student
    if folder != student:
        run = RunFolder(student)
        run.verify(run.student)
    if not folder.is_dir():
        raise ModelError("There is no such folder.", asked=student, fix="download a hub model into a folder first")

    from xarch_kd.cli.console import quiet_libraries

    quiet_libraries()
    from xarch_kd.models.loading.load import load_model, load_tokenizer
    from xarch_kd.models.loading.reference import read_config_json
    from xarch_kd.models.loading.save import save_student
    from xarch_kd.models.mamba_ssm.config import is_mamba_ssm
    from xarch_kd.models.mamba_ssm.format import export_mamba_ssm

    if is_mamba_ssm(read_config_json(folder)) == (format == "mamba_ssm"):
        raise UsageError(
            f"{folder} is in the format of {format} already.",
            fix=f"--format {'transformers' if format == 'mamba_ssm' else 'mamba_ssm'}, or copy the folder",
        )
    # None: the dtype that it was saved in.
    model = load_model(str(folder), dtype=None)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = load_tokenizer(str(folder)) if has_tokenizer else None
    if format == "mamba_ssm":
        export_mamba_ssm(model, output, tokenizer)
    else:
        save_student(model, tokenizer, output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = "MambaLMHeadModel of mamba_ssm" if format == "mamba_ssm" else type(model).__name__
    print(printable(f"{output}: {name}, {parameters:,} parameters{'' if has_tokenizer else ', no tokenizer'}"))
