"""Accuracy of copying, against the models' own logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from xarch_kd.errors import DataError
from xarch_kd.evaluation.copying import CopyingResult, compare_copying, copied_tokens, copying_rows
from xarch_kd.evaluation.results import Evaluation, from_json, render_plain, to_json
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


def test_rows_have_random_tokens_twice_and_the_tokenizers_filler() -> None:
    tokenizer = tiny_tokenizer()
    rows = copying_rows(tokenizer, lists=6, vocabulary=90, items=20, filler=10)
    assert rows.ids.shape == (6, 50)
    assert torch.equal(rows.ids[:, :20], rows.ids[:, 30:])
    assert len({tuple(row) for row in rows.ids[:, :20].tolist()}) == 6
    assert not set(tokenizer.all_special_ids) & set(rows.ids[:, :20].flatten().tolist())
    assert int(rows.ids[:, :20].max()) < 90
    text = str(tokenizer.decode(rows.ids[0, 20:30]))
    assert text[0].isupper() and text[1:].replace(" ", "").isalpha()


def test_accuracy_is_that_of_the_models_own_logits() -> None:
    rows = copying_rows(tiny_tokenizer(), lists=5, vocabulary=97, items=12, filler=6)
    models = tiny_model("llama"), tiny_model("bamba", seed=1)
    expected = []
    for model in models:
        with torch.no_grad():
            guess = model(rows.ids).logits.argmax(-1)
        expected.append((guess[:, 18:29] == rows.ids[:, 19:]).float())
    found = [copied_tokens(model, rows, batch_size=2) for model in models]
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))
    result = compare_copying(*models, rows)
    assert (result.lists, result.items, result.filler) == (5, 12, 6)
    assert result.teacher == pytest.approx(float(expected[0].mean()))
    assert result.difference == pytest.approx(result.student - result.teacher)


def test_a_model_that_predicts_what_it_read_18_tokens_before_copies_everything() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    rows = copying_rows(tiny_tokenizer(), lists=2, vocabulary=97, items=12, filler=6)
    inner = model.model.forward

    def shifted(**inputs: torch.Tensor) -> tuple[torch.Tensor]:
        inner(**inputs)
        wanted = torch.nn.functional.one_hot(inputs["input_ids"].roll(17, 1), 97).float()
        return (wanted,)  # which the head below, an identity, takes as logits

    model.model.forward = shifted
    model.lm_head.weight = torch.nn.Parameter(torch.eye(97))
    assert float(copied_tokens(model, rows).mean()) == 1.0


def test_a_vocabulary_smaller_than_a_list_is_refused() -> None:
    with pytest.raises(DataError, match=r"vocabulary is smaller than a list"):
        copying_rows(tiny_tokenizer(), lists=1, vocabulary=40)


def test_the_result_is_part_of_the_evaluation() -> None:
    copying = CopyingResult(
        lists=24, items=48, filler=64, teacher=0.5, student=0.4, difference=-0.1, low=-0.12, high=-0.08
    )
    whole = Evaluation(teacher="T", student="S", level=0.95, resamples=9, seed=0, results={"copying": copying})
    assert from_json(to_json(whole)) == whole
    assert "copying: teacher 0.500, student 0.400, 80% of the teacher's; difference -0.100" in render_plain(whole)
    assert dataclasses.replace(copying, teacher=0.0).ratio is None
