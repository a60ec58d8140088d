"""Evaluation of a run: its saved student against its teacher, on held-out text and on text of other kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from rich.console import Console

from xarch_kd.data.batches import Batch
from xarch_kd.errors import DataError, GateFailed, UsageError, suggest
from xarch_kd.evaluation.evaluate import compare_models
from xarch_kd.evaluation.registry import SUITES
from xarch_kd.evaluation.results import Evaluation, read_evaluation, render, write_evaluation
from xarch_kd.evaluation.sizes import SIZES
from xarch_kd.files import CHECKSUM_FILE
from xarch_kd.job.card import write_card
from xarch_kd.job.fingerprint import evaluated_inputs, teacher_inputs
from xarch_kd.job.layer_choice import read_selection
from xarch_kd.job.models import device_of, load_run_tokenizer, load_weights
from xarch_kd.job.partial import PartialResults, evaluation_key
from xarch_kd.job.texts import HELD_OUT, RunText, evaluation_texts, run_text
from xarch_kd.mapping_file.schema import Evaluate, EvaluationSize, Speed
from xarch_kd.models.loading.load import DTYPES
from xarch_kd.planning.context_lengths import speed_problems
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import plan_of_run, selected_plan
from xarch_kd.run.fingerprint import check_recorded
from xarch_kd.run.folder import RunFolder
from xarch_kd.run.report import Reporter

# Seconds of timing where the suite `speed` is named and its settings have none.
NAMED_SECONDS: Final = 300.0
_TEXT_SUITES: Final = tuple(name for name, suite in SUITES.items() if suite.needs_text)


def evaluate(
    run: str | Path,
    *,
    suites: Sequence[str] | None = None,
    tokens: int | None = None,
    size: EvaluationSize | None = None,
    speed: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measure the student of `run`, write `evaluation.json`, model card and manifest, and return the figures.

    `suites` are the names of those to measure (default: the mapping file's `evaluate.suites`); figures of other suites
    stay as they were measured before. `tokens` bounds the tokens of each text, and those that each model writes
    (default: `evaluate.tokens`); `size` is that of the suites that sample (default: `evaluate.size`). `speed` are keys
    of `evaluate.speed` to replace; where `suites` names `speed`, times are measured for up to 300 seconds unless
    `seconds` is given. Relative paths of the mapping file start where the run was trained.

    Raises UsageError when `run` is not a finished run folder, or its text, tokenizer or teacher is not the one that it
    was made from, and for a suite, lengths or a memory that do not exist or fit; CheckpointError for a file that is not
    as it was written.

    >>> import xarch_kd as xkd
    >>> from rich.console import Console
    >>> from xarch_kd.testing.examples import write_example_files
    >>> write_example_files()  # teacher/, text.txt and mapping.yaml, all tiny
    >>> run = xkd.train("mapping.yaml", "runs/first", console=Console(quiet=True))
    >>> evaluation = xkd.evaluate("runs/first", tokens=64, console=Console(quiet=True))
    >>> evaluation.result("held-out").tokens > 0
    True
    >>> evaluation.speed.contexts[0].student.cache_bytes > 0
    True
    """
    folder = _finished_run(Path(run))
    reporter = Reporter(console)
    with folder.locked(), folder.working_directory():
        folder.verify(folder.mapping, folder.plan, folder.student, folder.projector_reports, folder.selection)
        plan = plan_of_run(folder.mapping)
        if folder.selection.is_file():
            plan = selected_plan(plan, read_selection(folder.selection, plan))
        settings = _settings(plan.mapping.evaluate or Evaluate(), suites, tokens, size, speed)
        plan = replace(plan, mapping=plan.mapping.model_copy(update={"evaluate": settings}))
        _check_speed(plan)
        tokenizer = load_run_tokenizer(plan)
        if set(_TEXT_SUITES) & set(settings.suites):
            text = run_text(plan, tokenizer, reporter)
            inputs = evaluated_inputs(plan, tokenizer, text)
        else:
            text, inputs = None, teacher_inputs(plan, tokenizer)
        check_recorded(folder.recorded(), inputs, folder=folder.root)
        evaluation = measure(plan, folder, reporter, text)
        write_card(plan, folder)
        folder.update_manifest(folder.evaluation, folder.student / "README.md", folder.student / CHECKSUM_FILE)
    return evaluation


def _finished_run(path: Path) -> RunFolder:
    """Return the folder of a finished run. Raises UsageError for another folder."""
    folder = RunFolder(path.resolve())
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
    return folder


def _settings(
    settings: Evaluate,
    suites: Sequence[str] | None,
    tokens: int | None,
    size: EvaluationSize | None,
    speed: Mapping[str, Any] | None,
) -> Evaluate:
    """Return the settings of a mapping file with what was given instead. Raises UsageError."""
    changes: dict[str, Any] = {name: value for name, value in (("tokens", tokens), ("size", size)) if value is not None}
    if size is not None and size not in SIZES:
        raise UsageError(f"There is no size '{size}'.{suggest(size, SIZES)}", allowed=", ".join(SIZES))
    for name in suites or ():
        if name not in SUITES:
            raise UsageError(f"There is no suite '{name}'.{suggest(name, SUITES)}", allowed=", ".join(SUITES))
    if suites is not None and not suites:
        raise UsageError("No suite was given.", allowed=", ".join(SUITES))
    if suites is not None:
        changes["suites"] = tuple(suites)
    chosen = changes.get("suites", settings.suites)
    for given, served in ((tokens or size, _TEXT_SUITES), (speed, ("speed",))):
        if given and not set(served) & set(chosen):
            raise UsageError(
                f"An option of the suite '{served[0]}' was given, which is not measured.",
                asked=f"suites {', '.join(chosen)}",
                fix=f"name it too: --suites {','.join((*chosen, served[0]))}",
            )
    values = {**settings.speed.model_dump(), **(speed or {})}
    if suites is not None and "speed" in suites and not values["seconds"] and "seconds" not in (speed or {}):
        values["seconds"] = NAMED_SECONDS
    try:
        changes["speed"] = Speed.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'lengths'}: {each['msg']}" for each in error.errors()
        )
        raise UsageError("The settings of the suite 'speed' are not valid.", found=problems) from None
    return settings.model_copy(update=changes)


def _check_speed(plan: Plan) -> None:
    """Raise UsageError for settings of `speed` that do not fit the models, before any weight is read."""
    settings = plan.mapping.evaluate
    if settings is not None and "speed" in settings.suites:
        for key, problem in speed_problems(settings.speed, plan.models.teacher.layout, plan.models.student.layout):
            raise UsageError(f"evaluate.speed.{key}: {problem}")


def measure(plan: Plan, folder: RunFolder, reporter: Reporter, text: RunText | None = None) -> Evaluation:
    """Measure the student saved in `folder`, and write and print the result.

    All but speed is that of both models in float32. `text` is that of the run, read here if it is not given.
    Figures of suites that are not measured stay as they are in the folder. After an interruption it continues with the
    suite that was interrupted.
    """
    settings = plan.mapping.evaluate or Evaluate()
    tokenizer = load_run_tokenizer(plan)
    texts: dict[str, list[Batch]] = {}
    descriptions: dict[str, str] = {}
    if set(_TEXT_SUITES) & set(settings.suites):
        texts, descriptions = evaluation_texts(plan, tokenizer, reporter, text)
        sizes = {name: sum(batch.tokens for batch in batches) for name, batches in texts.items()}
        reporter.line(f"measuring on {', '.join(f'{tokens:,} tokens of {name}' for name, tokens in sizes.items())}")
    device = device_of(plan)
    teacher = plan.mapping.teacher
    # Accuracies are those in float32; bytes and times are rounded to their own dtype by the suite.
    dtype = DTYPES[settings.speed.dtype if settings.suites == ("speed",) else "float32"]
    key = evaluation_key(folder, settings, plan.mapping.seed, teacher.model, texts)
    partial = PartialResults(folder, key)
    evaluation = compare_models(
        load_weights(
            teacher.model,
            reporter,
            revision=teacher.revision,
            dtype=dtype,
            device=device,
            quantization=teacher.quantization,
            allow_quantized=True,
        ),
        load_weights(str(folder.student), reporter, dtype=dtype, device=device),
        texts,
        suites=settings.suites,
        descriptions=descriptions,
        teacher_name=teacher.model,
        student_name=str(_from_here(folder.student)),
        teacher_paths=teacher.paths,
        student_paths=plan.mapping.student.paths,
        seed=plan.mapping.seed,
        tokenizer=tokenizer,
        speed=settings.speed,
        size=SIZES[settings.size].within(settings.tokens),
        measured=partial.results,
        on_result=partial.add,
        reporter=reporter,
    )
    before = _earlier(folder.evaluation)
    if before is not None:
        for text_name in _changed_texts(before, evaluation):
            reporter.line(f"warning: {text_name} has other tokens than when the run was measured before")
        kept = {name: before.results[name] for name in before.measured() if name not in settings.suites}
        evaluation = replace(evaluation, results={**evaluation.results, **kept})
    write_evaluation(evaluation, folder.evaluation)
    partial.remove()
    reporter.show(render(evaluation))
    return evaluation


def _earlier(file: Path) -> Evaluation | None:
    """Return the evaluation in the folder, None if there is none that can be read."""
    try:
        return read_evaluation(file)
    except DataError:
        return None


def _changed_texts(before: Evaluation, evaluation: Evaluation) -> list[str]:
    """Return the texts, of as many rows as in an earlier evaluation, whose tokens differ from then."""
    fingerprints = {(result.text, result.rows): result.fingerprint for result in before.likelihood}
    return [
        result.text
        for result in evaluation.likelihood
        if fingerprints.get((result.text, result.rows), result.fingerprint) != result.fingerprint
    ]


def _from_here(path: Path) -> Path:
    """Return a path as it is written from the working directory, where it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def check_gate(evaluation: Evaluation, gate: float) -> None:
    """Raise GateFailed unless the held-out difference is at most `gate` nats; DataError if it was not measured."""
    difference = evaluation.result(HELD_OUT).difference
    if difference > gate:
        raise GateFailed(
            "the student's held-out NLL is too far above the teacher's",
            found=f"{difference:+.4f} nats",
            allowed=f"at most {gate:+.4f}",
        )
