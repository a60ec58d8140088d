"""Comparison of two models by the suites of `SUITES`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.data.batches import Batch
from xarch_kd.evaluation.base import Subjects
from xarch_kd.evaluation.likelihood import ModelPaths, batches_of
from xarch_kd.evaluation.registry import SUITES
from xarch_kd.evaluation.results import Evaluation
from xarch_kd.evaluation.statistics import LEVEL, RESAMPLES
from xarch_kd.mapping_file.schema import Speed
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
    copying: int = 24,
    speed: Speed | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Return the results of `suites` for two models, by default their likelihood on each text.

    `texts` maps a name to packed rows [rows, T] (integers, no padding), or to batches, whose padding and tokens left
    out by labels do not count; rows may differ in length between texts. `descriptions` gives the kind of each text,
    which is printed beside its name. The suite `copying` measures `copying` lists of tokens of `tokenizer`. Models stay
    on their device; the suite `speed` rounds both to the dtype of its settings, `speed`. `reporter` shows the progress.

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
        copying=copying,
        speed=speed or Speed(),
        reporter=reporter or Reporter.silent(),
    )
    results = {name: suite.measure(subjects) for name, suite in SUITES.items() if name in suites}
    return Evaluation(
        teacher=teacher_name, student=student_name, level=level, resamples=resamples, seed=seed, **results
    )
