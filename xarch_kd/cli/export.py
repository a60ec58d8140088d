"""`xarch-kd export`: a student in another library's format, or back in that of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from xarch_kd.errors import ModelError, UsageError


def command(
    student: Annotated[Path, typer.Argument(help="Folder of a student, of a run, or in mamba_ssm's format.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")],
    format: Annotated[
        Literal["mamba_ssm", "transformers"],
        typer.Option(help="mamba_ssm: for MambaLMHeadModel.from_pretrained; transformers: the stock class it equals."),
    ] = "mamba_ssm",
) -> None:
    """Write a student in the format of mamba_ssm, or one of that format in the format of transformers."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty folder.", fix="give a new folder as --output")
    # A run folder holds its student, and is what other commands are given.
    folder = student / "student" if (student / "student" / "config.json").is_file() else student
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
    # In the dtype that it was saved in.
    model = load_model(str(folder), dtype=None)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = load_tokenizer(str(folder)) if has_tokenizer else None
    if format == "mamba_ssm":
        export_mamba_ssm(model, output, tokenizer)
    else:
        save_student(model, tokenizer, output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    said = "MambaLMHeadModel of mamba_ssm" if format == "mamba_ssm" else type(model).__name__
    print(f"{output}: {said}, {parameters:,} parameters{'' if has_tokenizer else ', no tokenizer'}")
