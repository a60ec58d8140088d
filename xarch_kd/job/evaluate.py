"""Evaluation of a run: its saved student against its teacher, on held-out text and on text of other kinds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.errors import DataError, GateFailed, UsageError
from xarch_kd.evaluation.copying import CopyingResult, compare_copying, copying_rows
from xarch_kd.evaluation.evaluate import compare_models
from xarch_kd.evaluation.results import Evaluation, read_evaluation, render, write_evaluation
from xarch_kd.job.card import write_card
from xarch_kd.job.fingerprint import evaluated_inputs
from xarch_kd.job.models import device_of, load_run_tokenizer, load_weights
from xarch_kd.job.texts import HELD_OUT, RunText, evaluation_texts, run_text
from xarch_kd.mapping_file.schema import Evaluate
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import plan_of_run
from xarch_kd.run.fingerprint import check_recorded
from xarch_kd.run.folder import RunFolder
from xarch_kd.run.report import Reporter


def evaluate(run: str | Path, *, tokens: int | None = None, console: Console | None = None) -> Evaluation:
    """Measure the student of `run`, write `evaluation.json`, model card and manifest, and return the figures.

    `tokens` bounds the tokens of each text (default: the mapping file's `evaluate.tokens`). Relative paths of the
    mapping file start where the run was trained. Raises UsageError when `run` is not a finished run folder, or its
    text, tokenizer or teacher is not the one that it was made from, CheckpointError for a file that is not as it was
    written.

    >>> import xarch_kd as xkd
    >>> from rich.console import Console
    >>> from xarch_kd.testing.examples import write_example_files
    >>> write_example_files()  # teacher/, text.txt and mapping.yaml, all tiny
    >>> run = xkd.train("mapping.yaml", "runs/first", console=Console(quiet=True))
    >>> evaluation = xkd.evaluate("runs/first", tokens=64, console=Console(quiet=True))
    >>> evaluation.result("held-out").tokens > 0
    True
    """
    folder = RunFolder(Path(run).resolve())
    if not folder.mapping.is_file() or not (folder.student / "config.json").is_file():
        raise UsageError(
            "this is not a run folder with a student in it",
            asked=folder.root,
            fix="give the folder that `xarch-kd train … --output` finished",
        )
    if not folder.manifest.is_file():
        raise UsageError(
            "the run is not finished: it has a student, but no manifest",
            asked=folder.root,
            fix="finish it first: xarch-kd train … --resume",
        )
    reporter = Reporter(console)
    with folder.locked(), folder.working_directory():
        folder.verify(folder.mapping, folder.plan, folder.student, folder.projector_reports)
        plan = plan_of_run(folder.mapping)
        settings = plan.mapping.evaluate or Evaluate()
        if tokens is not None:
            settings = settings.model_copy(update={"tokens": tokens})
        plan = replace(plan, mapping=plan.mapping.model_copy(update={"evaluate": settings}))
        tokenizer = load_run_tokenizer(plan)
        text = run_text(plan, tokenizer, reporter)
        check_recorded(folder.recorded(), evaluated_inputs(plan, tokenizer, text), folder=folder.root)
        evaluation = measure(plan, folder, reporter, text)
        write_card(plan, folder)
        folder.update_manifest(folder.evaluation, folder.student / "README.md")
    return evaluation


def measure(plan: Plan, folder: RunFolder, reporter: Reporter, text: RunText | None = None) -> Evaluation:
    """Measure the student saved in `folder`, both models in float32, and write and print the result.

    `text` is that of the run, read here if it is not given.
    """
    tokenizer = load_run_tokenizer(plan)
    texts, descriptions = evaluation_texts(plan, tokenizer, reporter, text)
    sizes = {name: sum(batch.tokens for batch in batches) for name, batches in texts.items()}
    reporter.line(f"measuring on {', '.join(f'{tokens:,} tokens of {name}' for name, tokens in sizes.items())}")
    device = device_of(plan)
    teacher = plan.mapping.teacher
    models = (
        load_weights(
            teacher.model,
            reporter,
            revision=teacher.revision,
            device=device,
            quantization=teacher.quantization,
            allow_quantized=True,
        ),
        load_weights(str(folder.student), reporter, device=device),
    )
    evaluation = compare_models(
        *models,
        texts,
        descriptions=descriptions,
        teacher_name=teacher.model,
        student_name=str(_from_here(folder.student)),
        teacher_paths=teacher.paths,
        student_paths=plan.mapping.student.paths,
        seed=plan.mapping.seed,
        reporter=reporter,
    )
    evaluation = replace(evaluation, copying=_copying(plan, models, tokenizer, reporter))
    for text_name in _changed_texts(folder.evaluation, evaluation):
        reporter.line(f"warning: {text_name} has other tokens than when the run was measured before")
    write_evaluation(evaluation, folder.evaluation)
    reporter.show(render(evaluation))
    return evaluation


def _copying(
    plan: Plan,
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
) -> CopyingResult | None:
    """Return the copying accuracy of both models; None, with a line, where their positions or ids do not allow it."""
    lists = (plan.mapping.evaluate or Evaluate()).copying
    vocabulary = min(plan.teacher.vocabulary, plan.student.vocabulary)
    if lists == 0:
        return None
    try:
        rows = copying_rows(tokenizer, lists=lists, vocabulary=vocabulary)
    except DataError as error:
        reporter.line(f"warning: {error.message} ({error.found})")
        return None
    positions = [getattr(model.config, "max_position_embeddings", None) for model in models]
    if any(known is not None and known < rows.ids.shape[1] for known in positions):
        reporter.line(
            f"warning: copying is not measured: its rows have {rows.ids.shape[1]} tokens, more than positions"
        )
        return None
    return compare_copying(
        *models,
        rows,
        teacher_paths=plan.mapping.teacher.paths,
        student_paths=plan.mapping.student.paths,
        seed=plan.mapping.seed,
        reporter=reporter,
    )


def _changed_texts(earlier: Path, evaluation: Evaluation) -> list[str]:
    """Return the texts, of as many rows as in the file of an earlier evaluation, whose tokens differ from then."""
    try:
        before = {(result.text, result.rows): result.fingerprint for result in read_evaluation(earlier).likelihood}
    except DataError:
        return []
    return [
        result.text
        for result in evaluation.likelihood
        if before.get((result.text, result.rows), result.fingerprint) != result.fingerprint
    ]


def _from_here(path: Path) -> Path:
    """Return a path as it is written from the working directory, where it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def check_gate(evaluation: Evaluation, gate: float) -> None:
    """Raise GateFailed unless the held-out difference is at most `gate` nats."""
    difference = evaluation.result(HELD_OUT).difference
    if difference > gate:
        raise GateFailed(
            "the student's held-out NLL is too far above the teacher's",
            found=f"{difference:+.4f} nats",
            allowed=f"at most {gate:+.4f}",
        )
