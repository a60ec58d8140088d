"""`xarch-kd export`: convert a student to the format of another program, or back to that of transformers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from xarch_kd.errors import ModelError, UsageError, printable
from xarch_kd.models.layer_names import LayerNames
from xarch_kd.run.folder import RunFolder

Format = Literal["mamba_ssm", "transformers", "gguf"]
GgufType = Literal["f32", "f16", "bf16", "q8_0"]


def command(
    student: Annotated[Path, typer.Argument(help="Folder of a student, of a run, or in mamba_ssm's format.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New or empty folder; for gguf a new file.")],
    format: Annotated[
        Format,
        typer.Option(
            help="mamba_ssm: for MambaLMHeadModel.from_pretrained; transformers: the equivalent stock class; "
            "gguf: one file for llama.cpp."
        ),
    ] = "mamba_ssm",
    dtype: Annotated[
        GgufType | None, typer.Option(help="Type of the matrices of a GGUF file.", show_default="as they are saved")
    ] = None,
    layer_names: Annotated[
        LayerNames,
        typer.Option(
            help="Names of the layers in config.json; attention-mamba: those that SGLang, mlx-lm and the converter of "
            "llama.cpp expect of a GraniteMoeHybrid."
        ),
    ] = "transformers",
) -> None:
    """Convert a student from the format of transformers to that of mamba_ssm or llama.cpp, or back."""
    if format == "gguf":
        if output.exists():
            raise UsageError(f"{output} exists.", fix="give the name of a new file as --output, e.g. student.gguf")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty folder.", fix="give a new folder as --output")
    if dtype is not None and format != "gguf":
        raise UsageError(
            f"--dtype is for --format gguf; with --format {format} the weights keep their dtype.",
            asked=f"--dtype {dtype}",
        )
    if layer_names != "transformers" and format != "transformers":
        raise UsageError(
            f"--layer-names is for --format transformers; {format} has its own names.",
            asked=f"--layer-names {layer_names}",
            fix="add --format transformers",
        )
    folder = _student_folder(student)

    from xarch_kd.cli.console import quiet_libraries

    quiet_libraries()
    from xarch_kd.models.loading.load import load_model, load_tokenizer

    if format != "gguf" and layer_names == "transformers":
        _check_other_format(folder, format)
    # None: the dtype that it was saved in.
    model = load_model(str(folder), dtype=None)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = load_tokenizer(str(folder)) if has_tokenizer else None
    name = _write(model, output, tokenizer, format=format, dtype=dtype, layer_names=layer_names)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(printable(f"{output}: {name}, {parameters:,} parameters{'' if has_tokenizer else ', no tokenizer'}"))


def _student_folder(given: Path) -> Path:
    """Return the student's folder: of a run, which other commands take, its `student/`. Raises `ModelError`."""
    run = RunFolder(given)
    if (run.student / "config.json").is_file():
        run.verify(run.student)
        return run.student
    if run.plan.is_file():
        raise ModelError(
            f"The run {given} is not finished: it has no student yet.",
            fix=f"xarch-kd train {shlex.quote(str(run.mapping))} --output {shlex.quote(str(given))} --resume",
        )
    if not given.is_dir():
        raise ModelError("There is no such folder.", asked=given, fix="download a hub model into a folder first")
    return given


def _check_other_format(folder: Path, format: Format) -> None:
    """Raise UsageError if a folder is in the format that is asked for."""
    from xarch_kd.models.loading.reference import read_config_json
    from xarch_kd.models.mamba_ssm.config import is_mamba_ssm

    if is_mamba_ssm(read_config_json(folder)) == (format == "mamba_ssm"):
        raise UsageError(
            f"{folder} is in the format of {format} already.",
            fix=f"--format {'transformers' if format == 'mamba_ssm' else 'mamba_ssm'}, or copy the folder",
        )


def _write(
    model: Any, output: Path, tokenizer: Any, *, format: Format, dtype: GgufType | None, layer_names: LayerNames
) -> str:
    """Write a model in the format, and return what was written."""
    if format == "mamba_ssm":
        from xarch_kd.models.mamba_ssm.format import export_mamba_ssm

        export_mamba_ssm(model, output, tokenizer)
        return "MambaLMHeadModel of mamba_ssm"
    if format == "transformers":
        from xarch_kd.models.loading.save import save_student

        save_student(model, tokenizer, output, layer_names=layer_names)
        return type(model).__name__
    from xarch_kd.cli.console import make_console
    from xarch_kd.models.gguf.write import export_gguf
    from xarch_kd.run.report import Reporter

    with Reporter(make_console(stderr=True)).work("writing", None, "tensors") as work:
        written = export_gguf(model, output, tokenizer, dtype=dtype, progress=work.at)
    wider = f" ({written.widened} matrices in F16, whose rows are no multiple of 32)" if written.widened else ""
    return f"{written.architecture} of llama.cpp in {written.dtype.upper()}{wider}"
