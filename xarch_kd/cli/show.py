"""`xarch-kd show`: print a run's result on one screen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xarch_kd.cli.console import make_console, quiet_libraries
from xarch_kd.errors import UsageError
from xarch_kd.run.folder import RunFolder

PROMPTS = ("The with statement is used to", "Once upon a time there was a little girl who")


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, as written by `xarch-kd train`.")],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Prompt to continue; may be given several times.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after each prompt.")] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0: greedy decoding.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Show a run's result: the table, text that teacher and student generate, code that loads the student."""
    check_run(run)
    folder = RunFolder(run.resolve())
    folder.verify(folder.mapping, folder.plan, folder.evaluation, folder.projector_reports, folder.student)
    console = make_console()
    print_result(console, run)
    print_projectors(console, run)
    with folder.working_directory():
        table = generations(folder, prompt or list(PROMPTS), tokens=tokens, temperature=temperature, seed=seed)
    console.print(table)
    console.print()
    console.print(loading_lines(run / "student"), soft_wrap=True)


def check_run(run: Path) -> None:
    """Raise UsageError unless `run` is a run folder with a finished student."""
    if not run.is_dir():
        raise UsageError(f"There is no run folder {run}.", fix=f"xarch-kd train MAPPING.yaml --output {run}")
    if not (run / "mapping.yaml").is_file():
        raise UsageError(
            f"{run} is not a run folder: it has no mapping.yaml.", fix="give the folder that --output named"
        )
    if not (run / "student" / "config.json").is_file():
        raise UsageError(
            f"The run {run} is not finished: it has no student yet.",
            fix=f"xarch-kd train {run / 'mapping.yaml'} --output {run} --resume",
        )


def print_result(console: Console, run: Path) -> None:
    """Print the table of `evaluation.json`, or the command that writes it."""
    file = run / "evaluation.json"
    if not file.is_file():
        console.print(f"Not evaluated yet: xarch-kd evaluate {run}", soft_wrap=True)
        return
    from xarch_kd.evaluation.results import read_evaluation, render

    console.print(render(read_evaluation(file)))


def print_projectors(console: Console, run: Path) -> None:
    """Print the report on the run's projectors, if it has any."""
    file = run / "projectors.json"
    if not file.is_file():
        return
    from xarch_kd.calibration.projector_report import read_reports

    table = Table(title="Projectors: the teacher's variance that the student explains", title_justify="left")
    for heading in ("stage", "projector", "kind", "rank", "condition", "explained", "alone"):
        table.add_column(heading, justify="right" if heading in ("condition", "explained", "alone") else "left")
    reports = read_reports(file)
    for report in reports:
        found = report.diagnosis
        alone = "-" if found.alone is None else f"{found.alone:.0%}"
        rank = f"{found.rank}/{found.possible_rank}"
        figures = (found.kind, rank, f"{found.condition:.3g}", f"{found.explained:.0%}", alone)
        table.add_row(report.stage, report.projector, *figures)
    console.print(table)
    for report in reports:
        for warning in report.diagnosis.warnings:
            text = f"{report.stage}, {report.projector}: {warning}"
            console.print(text, soft_wrap=True)


def generations(folder: RunFolder, prompts: list[str], *, tokens: int, temperature: float, seed: int) -> Table:
    """Return a table of the text that teacher and student generate after each prompt."""
    quiet_libraries()
    from xarch_kd.generation.continuation import continuations
    from xarch_kd.generation.sampling import Sampling
    from xarch_kd.mapping_file.load import load_mapping
    from xarch_kd.models.loading.identity import model_identity
    from xarch_kd.models.loading.load import load_model, load_tokenizer
    from xarch_kd.run.fingerprint import check_recorded

    mapping, *_ = load_mapping(folder.mapping)
    identity = model_identity(mapping.teacher.model, mapping.teacher.revision)
    check_recorded(
        folder.recorded(), {f"teacher, {name}": value for name, value in identity.items()}, folder=folder.root
    )
    student_folder = str(folder.student)
    # The student's tokenizer gives the teacher's ids; it is read faster than one from a .gguf file.
    tokenizer = load_tokenizer(student_folder)
    sampling = Sampling(max_new_tokens=tokens, temperature=temperature)
    written: list[list[str]] = []
    for reference, revision in ((mapping.teacher.model, mapping.teacher.revision), (student_folder, None)):
        model = load_model(reference, revision=revision, allow_quantized=True)
        written.append(continuations(model, tokenizer, prompts, sampling, seed=seed))
        del model
    table = Table(title="The same prompt, two models", title_justify="left", show_lines=True, expand=True)
    for heading in ("teacher", "student"):
        table.add_column(heading, ratio=1, overflow="fold")
    for text, teacher, student in zip(prompts, *written, strict=True):
        table.add_row(*(Text.assemble((text, "bold"), answer) for answer in (teacher, student)))
    return table


def loading_lines(folder: Path) -> str:
    """Return the three lines of Python that load a student."""
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
            f'student = AutoModelForCausalLM.from_pretrained("{folder}")',
        ]
    )
