"""Suite `generation`: the same questions answered by likelihood and by writing, and free continuations.

A student that a likelihood cannot tell from its teacher may fail once it has to write (arXiv 2603.26556), so the gap
between both ways of asking is printed for both models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from xarch_kd.evaluation.base import Subjects
from xarch_kd.evaluation.choices import (
    CONTINUATION,
    LETTERS,
    OPTIONS,
    Answers,
    Question,
    answers,
    continuation_questions,
    letter_questions,
)
from xarch_kd.evaluation.cost import Cost, sampling_cost
from xarch_kd.evaluation.intervals import bootstrap, minimum_detectable_effect
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.evaluation.rollouts import CPU_ROWS, Continuations, text_rows
from xarch_kd.evaluation.suite_result import Curve, Figure, SuiteResult, TextPair, finite, line, signature_text

VERSION: Final = 1
# Tokens of text before a continuation that is to be chosen.
CONTEXT: Final = 32
# Tokens of a question with letters, about.
LETTER_TOKENS: Final = 56
SHOWN: Final = 4

Array = NDArray[np.float64]


def measure_generation(subjects: Subjects) -> SuiteResult:
    """Return accuracies by likelihood and by writing, their difference, and the form of free continuations.

    Raises NotMeasured for models that cannot write.
    """
    main = subjects.rollouts
    figures = list(_free(subjects, main.teacher, main.student))
    curves, notices = [], []
    for name, make in _tasks(subjects).items():
        try:
            questions = make()
            found = _answers(subjects, name, questions)
        except NotMeasured as error:
            notices.append(f"{name} are not asked: {error.message}")
            continue
        figures += _accuracies(subjects, name, questions, *found)
        if name == "letters":
            figures.append(_letter_bias(subjects, questions, *found))
            curves.append(_histogram(questions, *found))
    empty = [int((each.alive.sum(1) <= each.ended.long()).sum()) for each in (main.teacher, main.student)]
    if any(empty):
        notices.append(
            f"of {len(main.teacher.ids)} texts, {empty[0]} of the teacher and {empty[1]} of the student are empty"
        )
    settings = {
        "prompts": len(subjects.prompts),
        "new": subjects.new_tokens,
        "questions": subjects.size.prompts,
        "options": OPTIONS,
        "decoding": "T1 free, greedy answers",
        "interval": f"prompts {subjects.level:g}",
        "seed": subjects.seed,
    }
    return SuiteResult(
        signature=signature_text("generation", VERSION, settings),
        figures=tuple(figures),
        curves=tuple(curves),
        samples=tuple(_samples(subjects)),
        notices=tuple(notices),
    )


def generation_cost(subjects: Subjects) -> Mapping[str, Cost]:
    """Return the work: continuations of prompts, and questions with all their options."""
    prompts, width = subjects.prompts.shape
    count = subjects.size.prompts
    read = count * (OPTIONS * (min(CONTEXT, width) + CONTINUATION) + 2 * LETTER_TOKENS)
    return {
        "rollouts": sampling_cost(prompts, width, subjects.new_tokens),
        "questions": Cost(read=read, steps=-(-count // CPU_ROWS) * (CONTINUATION + 1)),
    }


def _tasks(subjects: Subjects) -> dict[str, Callable[[], list[Question]]]:
    """Return what makes the questions of each task."""
    count = subjects.size.prompts

    def continuations() -> list[Question]:
        return continuation_questions(text_rows(subjects.first_text, CONTEXT + CONTINUATION, count))

    def letters() -> list[Question]:
        if subjects.tokenizer is None:
            raise NotMeasured("there is no tokenizer")
        return letter_questions(subjects.tokenizer, count, subjects.seed)

    return {"continuations": continuations, "letters": letters}


def _answers(subjects: Subjects, name: str, questions: list[Question]) -> tuple[Answers, Answers]:
    vocabulary = min(len(layout.head_weight) for layout in subjects.layouts)
    longest = max(len(question.prompt) + len(question.options[0]) for question in questions)
    limits = [
        getattr(layout.model.config.get_text_config(), "max_position_embeddings", None) for layout in subjects.layouts
    ]
    if any(limit is not None and limit < longest for limit in limits):
        raise NotMeasured("questions are longer than the context", found=f"{longest} tokens", allowed=limits)
    if max(max(question.prompt + question.options[0]) for question in questions) >= vocabulary:
        raise NotMeasured("questions hold tokens outside of a vocabulary", allowed=f"0 to {vocabulary - 1}")
    with subjects.reporter.work(f"asking {name}, both models", 4 * len(questions), "questions") as work:
        return answers(subjects, 0, questions, work.advance), answers(subjects, 1, questions, work.advance)


def _accuracies(
    subjects: Subjects, name: str, questions: list[Question], teacher: Answers, student: Answers
) -> Iterator[Figure]:
    """Yield the accuracy by likelihood, by writing, and the first minus the second."""
    right = np.array([question.answer for question in questions])
    by_likelihood = [(each.likelihood == right).astype(np.float64) for each in (teacher, student)]
    by_writing = [(each.writing == right).astype(np.float64) for each in (teacher, student)]
    lost = [first - second for first, second in zip(by_likelihood, by_writing, strict=True)]
    yield _mean_figure(subjects, f"{name} by likelihood", "higher", *by_likelihood)
    yield _mean_figure(subjects, f"{name} by writing", "higher", *by_writing)
    yield _mean_figure(subjects, f"{name}, likelihood minus writing", "lower", *lost)


def _mean_figure(
    subjects: Subjects, name: str, better: str, teacher: Array, student: Array, *, unit: str = "", of: str = "questions"
) -> Figure:
    """Return a figure of means of the same prompts, with the interval of their difference."""
    gaps = student - teacher
    (gap,) = bootstrap(
        lambda weights: (weights @ gaps / weights.sum(1))[:, None],
        len(gaps),
        level=subjects.level,
        resamples=subjects.resamples,
        seed=subjects.seed,
    )
    return Figure(
        name=name,
        better=better,  # type: ignore[arg-type]  # one of the three words
        compared="difference",
        unit=unit,
        teacher=float(teacher.mean()),
        student=float(student.mean()),
        value=gap.value,
        low=finite(gap.low),
        high=finite(gap.high),
        p_value=gap.p_value,
        ceiling=0.0,
        count=len(gaps),
        of=of,
    )


def _bias(chosen: NDArray[np.int64], weights: Array) -> Array:
    """Return half of the sum of |share of each letter - 1/4| among answers, for each row of weights."""
    picks = np.stack([chosen == letter for letter in range(OPTIONS)], 1).astype(np.float64)
    shares = weights @ picks
    with np.errstate(invalid="ignore"):
        return 0.5 * np.abs(shares / shares.sum(1, keepdims=True) - 1 / OPTIONS).sum(1)


def _letter_bias(subjects: Subjects, questions: list[Question], teacher: Answers, student: Answers) -> Figure:
    both = (teacher.likelihood, student.likelihood)
    (gap,) = bootstrap(
        lambda weights: (_bias(both[1], weights) - _bias(both[0], weights))[:, None],
        len(questions),
        level=subjects.level,
        resamples=subjects.resamples,
        seed=subjects.seed,
    )
    values = [float(_bias(each, np.ones((1, len(questions))))[0]) for each in both]
    return Figure(
        name="letter bias",
        better="lower",
        compared="difference",
        teacher=values[0],
        student=values[1],
        value=gap.value,
        low=finite(gap.low),
        high=finite(gap.high),
        p_value=gap.p_value,
        ceiling=0.0,
        count=len(questions),
        of="questions",
    )


def _histogram(questions: list[Question], teacher: Answers, student: Answers) -> Curve:
    right = np.array([question.answer for question in questions])
    rows = {"teacher": teacher.likelihood, "student": student.likelihood, "right answers": right}
    return Curve(
        name="answers by letter",
        x=f"number of the letter ({LETTERS})",
        unit="share",
        at=tuple(float(number) for number in range(1, OPTIONS + 1)),
        lines={name: line((each == letter).mean() for letter in range(OPTIONS)) for name, each in rows.items()},
    )


def _free(subjects: Subjects, teacher: Continuations, student: Continuations) -> Iterator[Figure]:
    """Yield repetition, length and end of free continuations, each with the difference that would be found."""
    measures: dict[str, tuple[str, str, Callable[[Continuations], Array]]] = {
        "repetition within a text (4-grams)": ("teacher", "", _repetition),
        "length": ("teacher", "tokens", lambda found: found.alive.sum(1).double().numpy()),
        "texts that end": ("teacher", "", lambda found: found.ended.double().numpy()),
    }
    for name, (better, unit, measure) in measures.items():
        first, second = measure(teacher), measure(student)
        figure = _mean_figure(subjects, name, better, first, second, unit=unit, of="prompts")
        effect = minimum_detectable_effect(second - first, level=subjects.level)
        yield figure
        if effect is not None:
            yield Figure(
                name=f"{name}: smallest difference that these prompts would show",
                better="lower",
                compared="value",
                unit=unit,
                value=effect,
                count=len(first),
            )


def _repetition(found: Continuations) -> Array:
    """Return 1 - different 4-grams / 4-grams of each text [texts], 0 for shorter ones."""
    shares = []
    for text in found.texts():
        grams = [tuple(text[start : start + 4]) for start in range(len(text) - 3)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.array(shares)


def _samples(subjects: Subjects) -> Iterator[TextPair]:
    """Yield the first prompts and what each model wrote, as text; nothing without a tokenizer."""
    if subjects.tokenizer is None:
        return
    main = subjects.rollouts
    for prompt, teacher, student in list(
        zip(subjects.prompts, main.teacher.texts(), main.student.texts(), strict=True)
    )[:SHOWN]:
        decoded = [
            str(subjects.tokenizer.decode(torch.as_tensor(ids, dtype=torch.long))) for ids in (prompt, teacher, student)
        ]
        yield TextPair(prompt=decoded[0], teacher=decoded[1], student=decoded[2])
