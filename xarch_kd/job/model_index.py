"""Results of an evaluation in the `model-index` form, which hubs read from a model card's metadata."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from huggingface_hub import EvalResult

from xarch_kd.evaluation.results import Evaluation
from xarch_kd.evaluation.suite_result import SuiteResult

TASK: Final = "text-generation"


def model_index(evaluation: Evaluation) -> list[EvalResult]:
    """Return one result per text of the likelihood and measure, and one per figure of every other suite of figures.

    A result's dataset is the text or the suite, its revision the fingerprint of the tokens or the suite's signature.
    The arguments of a metric have what it is compared with, and the interval.
    """
    return [*_likelihood(evaluation), *_figures(evaluation)]


def _likelihood(evaluation: Evaluation) -> Iterator[EvalResult]:
    for text in evaluation.likelihood:
        interval = {"low": text.low, "high": text.high, "level": evaluation.level, "tokens": text.tokens}
        yield EvalResult(
            task_type=TASK,
            dataset_type=text.text,
            dataset_name=text.description or text.text,
            dataset_revision=text.fingerprint,
            metric_type="perplexity",
            metric_name="Perplexity",
            metric_value=text.student_perplexity,
            metric_args={"teacher": text.teacher_perplexity, "tokens": text.tokens},
        )
        yield EvalResult(
            task_type=TASK,
            dataset_type=text.text,
            dataset_name=text.description or text.text,
            dataset_revision=text.fingerprint,
            metric_type="nll_difference",
            metric_name="NLL above the teacher's, nats per token",
            metric_value=text.difference,
            metric_args=_known(interval),
        )


def _figures(evaluation: Evaluation) -> Iterator[EvalResult]:
    for suite, result in evaluation.results.items():
        if not isinstance(result, SuiteResult):
            continue
        for figure in result.figures:
            value = figure.student if figure.value is None else figure.value
            if value is None:
                continue
            compared = "value" if figure.value is None else figure.compared
            details: dict[str, Any] = {"compared": compared, "teacher": figure.teacher, "student": figure.student}
            details |= {"low": figure.low, "high": figure.high, "level": evaluation.level, figure.of: figure.count}
            yield EvalResult(
                task_type=TASK,
                dataset_type=suite,
                dataset_name=suite,
                dataset_revision=result.signature,
                metric_type=figure.name.replace(" ", "_"),
                metric_name=f"{figure.name}, {figure.unit}" if figure.unit else figure.name,
                metric_value=value,
                metric_args=_known(details),
            )


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
