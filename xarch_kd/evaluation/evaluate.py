"""Comparison of two models by the suites of `SUITES`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.data.batches import Batch
from xarch_kd.evaluation.base import Subjects, Suite
from xarch_kd.evaluation.cost import expected_seconds, total_cost
from xarch_kd.evaluation.likelihood import ModelPaths, batches_of
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.evaluation.registry import SUITES
from xarch_kd.evaluation.results import Evaluation
from xarch_kd.evaluation.sizes import SIZES, Size
from xarch_kd.evaluation.statistics import LEVEL, RESAMPLES
from xarch_kd.mapping_file.schema import Speed
from xarch_kd.planning.problems import one_line
from xarch_kd.planning.render import duration
from xarch_kd.run.report import Reporter


def compare_models(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    texts: Mapping[str, Tensor | Sequence[Batch]],
    *,
    suites: Sequence[str] = ("likelihood",),
    descriptions: Mapping[str, str] | None = None,
    teacher_name: str = "teacher",
    student_name: str = "student",
    teacher_paths: ModelPaths = None,
    student_paths: ModelPaths = None,
    batch_size: int = 4,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    speed: Speed | None = None,
    size: Size | None = None,
    measured: Mapping[str, Any] | None = None,
    on_result: Callable[[str, Any], None] | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Return the results of `suites` for two models, by default their likelihood on each text.

    `texts` maps a name to packed rows [rows, T] (integers, no padding), or to batches, whose padding and tokens left
    out by labels do not count; rows may differ in length between texts. `descriptions` gives the kind of each text,
    which is printed beside its name. Random tokens are those of `tokenizer`. `size` is
    that of the suites that sample, by default `quick`. Models stay on their device; the suite `speed` rounds both to
    the dtype of its settings, `speed`. `reporter` shows the expected cost and the progress. A suite that these models
    or texts cannot serve is left out with a warning. Results in `measured`, by suite, are taken as they are;
    `on_result` is called with each other one as soon as it is there.

    Raises:
        DataError: no text, or rows that are empty, too short or hold tokens outside a vocabulary.
        NonFiniteLoss: a likelihood is NaN or infinite.
        UsageError: lengths or memory of `speed` that do not fit the models.
    """
    subjects = Subjects(
        teacher=teacher,
        student=student,
        teacher_paths=teacher_paths,
        student_paths=student_paths,
        texts={name: batches_of(rows, batch_size) for name, rows in texts.items()},
        descriptions=descriptions or {},
        level=level,
        resamples=resamples,
        seed=seed,
        tokenizer=tokenizer,
        speed=speed or Speed(),
        size=size or SIZES["quick"],
        reporter=reporter or Reporter.silent(),
    )
    earlier = measured or {}
    results = {name: earlier[name] for name in SUITES if name in suites and name in earlier}
    if results:
        subjects.reporter.line(f"measured before the interruption: {', '.join(results)}")
    chosen = {name: suite for name, suite in SUITES.items() if name in suites and name not in results}
    _print_cost(subjects, chosen)
    for name, suite in chosen.items():
        try:
            result = suite.measure(subjects)
        except NotMeasured as error:
            subjects.reporter.line(f"warning: {name} is not measured: {one_line(error)}")
            continue
        if result is not None:
            results[name] = result
            if on_result is not None:
                on_result(name, result)
    return Evaluation(
        teacher=teacher_name, student=student_name, level=level, resamples=resamples, seed=seed, results=results
    )


def _print_cost(subjects: Subjects, suites: Mapping[str, Suite]) -> None:
    """Print the expected work and time of the suites that state it, before any of them begins."""
    parts = {}
    for name, suite in suites.items():
        # A suite that cannot be measured reports so when its turn comes.
        with contextlib.suppress(NotMeasured):
            parts[name] = suite.cost(subjects)
    cost = total_cost(parts.values())
    if not cost.read:
        return
    named = ", ".join(name for name, part in parts.items() if part)
    subjects.reporter.line(
        f"suites {named}: each model reads {cost.read:,} tokens and takes {cost.steps:,} steps of writing, "
        f"in about {duration(expected_seconds(subjects, cost))}"
    )
