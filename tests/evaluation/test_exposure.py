"""Exposure: closed forms of Markov pairs, exactly 0 for equal models, planted errors on a student's own text."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from xarch_kd.evaluation.evaluate import compare_models
from xarch_kd.evaluation.exposure import accumulated_excess
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.evaluation.results import Evaluation, from_json, render, to_json
from xarch_kd.evaluation.sizes import Size
from xarch_kd.evaluation.suite_result import SuiteResult
from xarch_kd.run.report import Reporter
from xarch_kd.testing.markov import accumulated_errors, markov_model
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

SIZE = Size(prompts=64, prompt_tokens=2, new_tokens=12, unconditional=8, swaps=(0.5,), probe_tokens=64)
TOKENS = 16

Array = NDArray[np.float64]


def noisy(seed: int, states: range, share: float) -> Array:
    """A teacher's transitions, with a share of other random ones after the `states`."""
    generator = np.random.default_rng(0)
    transitions = generator.dirichlet(np.ones(TOKENS), size=TOKENS) * 0.98 + 0.02 / TOKENS
    # The last four tokens follow no other token, as far as the teacher goes.
    transitions[:12, 12:] = 1e-4
    transitions /= transitions.sum(1, keepdims=True)
    other = np.random.default_rng(seed).dirichlet(np.ones(TOKENS), size=TOKENS)
    transitions[states] = (1 - share) * transitions[states] + share * other[states]
    return transitions / transitions.sum(1, keepdims=True)


TEACHER = noisy(1, range(0), 0.0)


def measure(teacher: Array, student: Array, size: Size = SIZE) -> SuiteResult:
    rows = torch.randint(0, 12, (size.prompts, 4), generator=torch.Generator().manual_seed(0))
    found = compare_models(markov_model(teacher), markov_model(student), {"text": rows}, suites=["exposure"], size=size)
    assert from_json(to_json(found)) == found
    result = found.results["exposure"]
    assert isinstance(result, SuiteResult)
    return result


def test_every_path_of_a_markov_pair_gives_the_closed_form_exactly() -> None:
    """Probabilities are multiples of 1/4, so 4^3 equally likely paths are the whole distribution of 4 tokens."""
    teacher, student = np.array([[0.75, 0.25], [0.5, 0.5]]), np.array([[0.25, 0.75], [0.75, 0.25]])
    error = (teacher * np.log(teacher / student)).sum(1)
    errors = []
    for transitions in (student, teacher):
        rows = []
        for shares in itertools.product((0.125, 0.375, 0.625, 0.875), repeat=3):
            path = [0]
            for share in shares:
                path.append(int(share > transitions[path[-1], 0]))
            rows.append(error[path])
        errors.append(np.array(rows))
    alive = np.ones_like(errors[0])
    found = accumulated_excess(errors[0], alive, errors[1], alive)
    own, others = accumulated_errors(teacher, student, np.array([1.0, 0.0]), 4)
    np.testing.assert_allclose(found.accumulated_own, own, rtol=1e-12)
    np.testing.assert_allclose(found.accumulated_others, others, rtol=1e-12)
    np.testing.assert_allclose(found.excess, 100 * (own / others - 1), rtol=1e-9)
    assert found.excess[0] == 0.0, "before any token of their own, both are at the same place"


def test_texts_that_have_ended_count_neither_above_nor_below() -> None:
    errors = np.array([[1.0, 9.0], [1.0, 3.0], [1.0, 3.0], [1.0, 3.0]])
    alive = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    found = accumulated_excess(errors, alive, np.ones((4, 2)), alive)
    assert found.accumulated_own.tolist() == [1.0, 4.0] and found.excess.tolist() == [0.0, 100.0]
    # A step that fewer than half of the few texts have is left out.
    few = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    assert len(accumulated_excess(errors, few, errors, alive).excess) == 1
    with pytest.raises(NotMeasured, match="almost no text"):
        accumulated_excess(errors, np.zeros((4, 2)), errors, alive)


def test_the_interval_covers_the_closed_form() -> None:
    """Nominal 95 %: 400 repetitions of 64 prompts; 2 to 4 points less is known, and 3 errors of the share are 3.3."""
    generator = np.random.default_rng(0)
    student = noisy(2, range(12), 0.3)
    error = (TEACHER * np.log(TEACHER / student)).sum(1)
    own, others = accumulated_errors(TEACHER, student, np.eye(TOKENS)[0], 16)
    expected, repetitions, prompts = 100 * (own[-1] / others[-1] - 1), 400, 64
    errors = []
    for transitions in (student, TEACHER):
        state, steps = np.zeros(repetitions * prompts, dtype=np.int64), []
        for _ in range(16):
            steps.append(error[state])
            share = generator.random((len(state), 1))
            state = np.minimum((share > transitions.cumsum(1)[state]).sum(1), TOKENS - 1)
        errors.append(np.stack(steps, 1).reshape(repetitions, prompts, 16))
    alive = np.ones((prompts, 16))
    covered = 0
    for one, two in zip(*errors, strict=True):
        found = accumulated_excess(one, alive, two, alive)
        covered += bool(found.low[-1] <= expected <= found.high[-1])
    assert 0.88 <= covered / repetitions <= 0.985


def test_a_student_equal_to_its_teacher_has_exactly_0() -> None:
    size = Size(prompts=8, prompt_tokens=2, new_tokens=6, unconditional=4, swaps=(0.5,), probe_tokens=64)
    rows = torch.randint(2, 97, (8, 4), generator=torch.Generator().manual_seed(0))
    found = compare_models(
        tiny_model("llama"),
        tiny_model("llama"),
        {"text": rows},
        suites=["exposure"],
        size=size,
        tokenizer=tiny_tokenizer(),
    ).results["exposure"]
    assert len(found.figures) == 6, "four divergences, one without a prompt, one swap of prefixes"
    for figure in found.figures:
        assert (figure.value, figure.low, figure.high, figure.p_value) == (0.0, 0.0, 0.0, 1.0)
    for name in ("excess accumulated error", "incremental excess error", "prefix swap"):
        for values in found.curve(name).lines.values():
            assert set(values) == {0.0}


def test_errors_on_a_students_own_text_are_found_and_errors_everywhere_are_not() -> None:
    """The student goes to the last four tokens, which the teacher avoids, and errs after them alone."""
    lapsing = noisy(3, range(12, 16), 0.9)
    lapsing[:12] = 0.93 * TEACHER[:12]
    lapsing[:12, 12:] += 0.07 / 4
    own, others = accumulated_errors(TEACHER, lapsing, np.full(TOKENS, 1 / 12) * (np.arange(TOKENS) < 12), 12)
    found = measure(TEACHER, lapsing)
    figure = found.figure("excess accumulated error, forward KL, 12 tokens")
    assert figure.value is not None and figure.low is not None and figure.high is not None
    assert figure.low < 100 * (own[-1] / others[-1] - 1) < figure.high
    assert figure.low > 20 and figure.p_value is not None and figure.p_value < 1e-3
    assert figure.student == pytest.approx(own[-1], rel=0.15) and figure.teacher == pytest.approx(others[-1], rel=0.15)
    everywhere = measure(TEACHER, noisy(2, range(TOKENS), 0.3))
    figure = everywhere.figure("excess accumulated error, forward KL, 12 tokens")
    assert figure.value is not None and abs(figure.value) < 20
    assert "64 prompts" in rendered(found)


def rendered(result: SuiteResult) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(
        render(Evaluation(teacher="T", student="S", level=0.95, resamples=1, seed=0, results={"exposure": result}))
    )
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_models_that_cannot_write_are_left_out_with_a_warning() -> None:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    model = tiny_model("llama", max_position_embeddings=4)
    rows = torch.ones(4, 8, dtype=torch.long)
    found = compare_models(
        model,
        model,
        {"text": rows},
        suites=["exposure"],
        size=Size(**{**vars(SIZE), "prompt_tokens": 4}),
        reporter=Reporter(console),
    )
    assert isinstance(console.file, io.StringIO)
    assert found.results == {}
    assert "warning: exposure is not measured: a prompt leaves no room" in console.file.getvalue()
