"""Divergences, agreement and use of context against the models' own logits in float64."""

from __future__ import annotations

import math

import pytest
import torch

from xarch_kd.evaluation.divergences import token_divergences
from xarch_kd.evaluation.evaluate import compare_models
from xarch_kd.evaluation.results import from_json, to_json
from xarch_kd.evaluation.suite_result import SuiteResult
from xarch_kd.taps.layout import layout_of
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

ROWS = torch.randint(2, 97, (4, 32), generator=torch.Generator().manual_seed(0))


def details(teacher_seed: int, student_seed: int) -> SuiteResult:
    found = compare_models(
        tiny_model("llama", seed=teacher_seed),
        tiny_model("llama", seed=student_seed),
        {"text": ROWS, "other": ROWS[:2]},
        tokenizer=tiny_tokenizer(),
    )
    assert from_json(to_json(found)) == found
    assert found.likelihood[1].details is None
    result = found.likelihood[0].details
    assert result is not None
    return result


def test_divergences_are_those_of_the_logits() -> None:
    models = tiny_model("llama"), tiny_model("bamba", seed=1)
    found = token_divergences(layout_of(models[0]), layout_of(models[1]), ROWS, start=5, batch_size=3)
    with torch.no_grad():
        p, q = (model(ROWS).logits[:, 4:-1].double().softmax(-1) for model in models)
    middle = (p + q) / 2

    def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first * (first / second).log()).sum(-1)

    labels = ROWS[:, 5:]
    for values, expected in (
        (found.forward_kl, kl(p, q)),
        (found.reverse_kl, kl(q, p)),
        (found.jensen_shannon, (kl(p, middle) + kl(q, middle)) / 2),
        (found.total_variation, (p - q).abs().sum(-1) / 2),
        (found.teacher_nll, -p.gather(-1, labels[..., None])[..., 0].log()),
        (found.student_nll, -q.gather(-1, labels[..., None])[..., 0].log()),
        (found.agree, (p.argmax(-1) == q.argmax(-1)).double()),
        (found.student_right, (q.argmax(-1) == labels).double()),
    ):
        torch.testing.assert_close(values.double(), expected, atol=2e-5, rtol=2e-5)
    assert float(found.jensen_shannon.max()) <= math.log(2)


def test_figures_of_a_text() -> None:
    found = details(0, 1)
    models = tiny_model("llama"), tiny_model("llama", seed=1)
    with torch.no_grad():
        p, q = (model(ROWS).logits[:, :-1].double().log_softmax(-1) for model in models)
        short = [model(ROWS[:, 22:]).logits[:, 1:-1].double().log_softmax(-1) for model in models]
    labels = ROWS[:, 1:, None]
    nll = [-each.gather(-1, labels)[..., 0] for each in (p, q)]
    assert found.figure("forward KL").value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    # A token of this tokenizer is a character, of one byte; the filler tokens of its table are more.
    bits = found.figure("bits per byte")
    text_bytes = sum(len(text.encode()) for text in tiny_tokenizer().batch_decode(ROWS[:, 1:]))
    assert text_bytes >= 4 * 31
    assert bits.teacher == pytest.approx(float(nll[0].sum()) / math.log(2) / text_bytes, rel=1e-5)
    right = [each.argmax(-1) == labels[..., 0] for each in (p, q)]
    flips = (right[0] & ~right[1]).double().mean()
    assert found.figure("flips: right for the teacher alone").value == pytest.approx(float(flips))
    # Targets are the last 8 of 32 tokens, and the shortest context has 2 of them.
    curve = found.curve("NLL of the same tokens by context")
    assert curve.at == (2.0, 8.0, 24.0)
    for side, name in enumerate(("teacher", "student")):
        expected = -short[side].gather(-1, ROWS[:, 24:, None]).mean()
        assert curve.lines[name][0] == pytest.approx(float(expected), rel=1e-4)
        assert curve.lines[name][-1] == pytest.approx(float(nll[side][:, -8:].mean()), rel=1e-4)


def test_a_student_equal_to_its_teacher_agrees_everywhere() -> None:
    found = details(0, 0)
    for figure in found.figures:
        assert figure.value == figure.ceiling or ("gain" in figure.name and figure.value == 1.0), figure.name
