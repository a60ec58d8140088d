"""Two models on several texts: figures, JSON, printed table."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from xarch_kd.errors import DataError
from xarch_kd.evaluation.evaluate import compare_models
from xarch_kd.evaluation.likelihood import token_nll
from xarch_kd.evaluation.likelihood_suite import token_fingerprint
from xarch_kd.evaluation.results import (
    Evaluation,
    from_json,
    read_evaluation,
    render,
    render_plain,
    to_json,
    write_evaluation,
)
from xarch_kd.run.report import Reporter
from xarch_kd.testing.tiny import VOCABULARY, tiny_model

DESCRIPTIONS = {"held-out": "documents of the training corpus, never trained on", "licence": "text of another kind"}


def texts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "held-out": torch.randint(0, VOCABULARY, (6, 12), generator=generator),
        "licence": torch.randint(0, VOCABULARY, (4, 20), generator=generator),
    }


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    teacher, student = tiny_model("llama"), tiny_model("bamba", seed=1)
    return compare_models(teacher, student, texts(), descriptions=DESCRIPTIONS, teacher_name="T", student_name="S")


def test_each_text_has_its_own_result(evaluation: Evaluation) -> None:
    assert [result.text for result in evaluation.likelihood] == ["held-out", "licence"]
    for name, ids in texts().items():
        result = evaluation.result(name)
        teacher, student = token_nll(tiny_model("llama"), ids), token_nll(tiny_model("bamba", seed=1), ids)
        assert result.description == DESCRIPTIONS[name]
        assert (result.rows, result.tokens) == (ids.shape[0], ids.shape[0] * (ids.shape[1] - 1))
        assert result.teacher_nll == pytest.approx(float(teacher.mean()), rel=1e-6)
        assert result.student_nll == pytest.approx(float(student.mean()), rel=1e-6)
        assert result.difference == pytest.approx(result.student_nll - result.teacher_nll, rel=1e-6)
        assert result.low is not None and result.high is not None
        assert result.low < result.difference < result.high
        first = result.by_position[0]
        assert (first.start, first.stop) == (1, 2)
        assert first.student_nll == pytest.approx(float(student[:, 0].mean()), rel=1e-6)
        assert result.by_position[-1].stop == ids.shape[1]


def test_a_model_against_itself() -> None:
    model = tiny_model("llama")
    result = compare_models(model, model, texts()).result("licence")
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_progress_names_text_and_model_with_a_rate() -> None:
    model, printed, ticks = tiny_model("llama"), io.StringIO(), itertools.count()
    # Each reading of the clock is 4 seconds after the one before.
    reporter = Reporter(Console(file=printed, width=200), clock=lambda: 4.0 * next(ticks))
    compare_models(model, model, texts(), batch_size=4, reporter=reporter)
    lines = printed.getvalue().splitlines()
    tokens = texts()["held-out"].numel()
    read = tokens * 4 // 6
    assert lines[0].startswith(f"measuring held-out, teacher  {read:,}/{tokens:,} tokens  {read / 4:,.0f} tokens/s")
    assert lines[0].endswith("ETA 0:02")
    assert [line.split("  ")[0] for line in lines if "ETA" in line] == [
        *(f"measuring {text}, {model}" for text in texts() for model in ("teacher", "student")),
        "comparing distributions, both models",
    ]


def test_json_comes_back_the_same(evaluation: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_evaluation(evaluation, path)
    assert read_evaluation(path) == evaluation
    data = json.loads(path.read_text())
    assert data["results"]["likelihood"][0]["teacher_perplexity"] == pytest.approx(
        evaluation.likelihood[0].teacher_perplexity
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluation.json"]
    hopeless = dataclasses.replace(evaluation.likelihood[0], student_nll=1e4, low=None, high=None, p_value=None)
    extreme = dataclasses.replace(evaluation, results={"likelihood": (hopeless,)})
    assert from_json(to_json(extreme)) == extreme


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not an evaluation"),
        ("[]", "not an evaluation"),
        ('{"format": 2}', "KeyError"),
        ('{"format": 1}', "another format"),
    ],
)
def test_another_file_is_refused(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    with pytest.raises(DataError, match="cannot be read"):
        read_evaluation(path)
    path.write_text(text)
    with pytest.raises(DataError, match=word):
        read_evaluation(path)


def shown(evaluation: Evaluation, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(evaluation))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_both_kinds_of_text_are_shown_apart(evaluation: Evaluation) -> None:
    for text in (shown(evaluation), render_plain(evaluation)):
        lines = text.splitlines()
        for name, description in DESCRIPTIONS.items():
            assert any(name in line and description in line for line in lines)
            result = evaluation.result(name)
            assert f"{result.teacher_nll:.3f}" in text and f"{result.student_nll:.3f}" in text
            assert f"{result.low:+.3f} to {result.high:+.3f}" in text
        assert "student - teacher" in text and "95%" in text and "2000 resamples" in text
    assert "8-11" in shown(evaluation) and "16-19" in shown(evaluation)


def test_markup_in_a_name_is_text(evaluation: Evaluation) -> None:
    odd = dataclasses.replace(evaluation.likelihood[0], text="[red]x[/]", description="[bold]")
    assert "[red]x[/]" in shown(dataclasses.replace(evaluation, results={"likelihood": (odd,)}))


def test_the_fingerprint_stands_for_the_tokens(evaluation: Evaluation) -> None:
    ids = texts()["held-out"]
    assert evaluation.result("held-out").fingerprint == token_fingerprint(ids.to(torch.int32))
    assert token_fingerprint(ids) != token_fingerprint(ids.view(4, 18))
    assert token_fingerprint(ids) != token_fingerprint(ids.flip(0))


def test_what_is_refused(evaluation: Evaluation) -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match="no text to measure"):
        compare_models(model, model, {})
    with pytest.raises(DataError, match="description has no text"):
        compare_models(model, model, texts(), descriptions={"held": "?"})
    with pytest.raises(DataError, match=r"held-out \| licence"):
        evaluation.result("nowhere")
