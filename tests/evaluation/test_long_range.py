"""Long range: rows whose end follows from their start, accuracy of the models' own logits, attention that is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from xarch_kd.evaluation.evaluate import compare_models
from xarch_kd.evaluation.long_range import TASKS, Rows, Writer, half_length, row_accuracy, rows_of
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.evaluation.results import from_json, to_json
from xarch_kd.evaluation.sizes import Size
from xarch_kd.taps.layout import layout_of
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

SIZE = Size(prompts=4, prompt_tokens=4, new_tokens=4, unconditional=2, swaps=(), probe_tokens=256)


def writer(length: int = 64, vocabulary: int = 97) -> Writer:
    return Writer(tiny_tokenizer(), vocabulary, length, 0)


def context(task: str, row: np.ndarray, at: int) -> int:
    """Return how many tokens before `at` determine it: those of the list, the marker's end, the key, the pair."""
    return {"repeat copy": 2, "passkey": 1, "associative recall": 1, "induction": 2}[task]


@pytest.mark.parametrize("task", list(TASKS))
def test_what_is_asked_follows_from_what_was_read(task: str) -> None:
    rows = rows_of(task, writer(), 6)
    assert rows.ids.shape == rows.asked.shape == (6, 64)
    assert rows.asked.any(1).all() and not rows.asked[:, :32].any()
    assert len({tuple(row) for row in rows.ids.tolist()}) == 6
    tokenizer = tiny_tokenizer()
    for row, asked in zip(rows.ids, rows.asked, strict=True):
        assert not set(row.tolist()) & set(tokenizer.all_special_ids) and row.max() < 97
        for at in np.flatnonzero(asked):
            width = context(task, row, int(at))
            before = row[at - width : at].tolist()
            followers = {int(row[s + width]) for s in range(at - width) if row[s : s + width].tolist() == before}
            assert int(row[at]) in followers or (task == "repeat copy" and at == 64 - 3 * 64 // 8 + 1)


def test_accuracy_is_that_of_the_models_own_logits() -> None:
    rows = rows_of("associative recall", writer(), 5)
    for model in (tiny_model("llama"), tiny_model("bamba", seed=1)):
        with torch.no_grad():
            guess = model(torch.from_numpy(rows.ids)).logits.argmax(-1).numpy()
        right = np.roll(guess, 1, 1) == rows.ids
        expected = [right[row][rows.asked[row]].mean() for row in range(5)]
        np.testing.assert_allclose(row_accuracy(layout_of(model), rows), expected)


def looking_back(window: int) -> PreTrainedModel:
    """Return a model that predicts what followed the last token when it was last read, within a window."""
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=512)

    def forward(input_ids: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        hidden = torch.zeros(*input_ids.shape, 97)
        for row, ids in enumerate(input_ids.tolist()):
            for now, token in enumerate(ids):
                for before in range(now - 1, max(-1, now - 1 - window), -1):
                    if ids[before] == token:
                        hidden[row, now, ids[before + 1]] = 10.0
                        break
        return (hidden,)

    model.model.forward = forward
    model.lm_head.weight = torch.nn.Parameter(torch.eye(97))
    return model


def test_attention_that_is_cut_is_found_here_and_not_by_likelihood() -> None:
    # Text without a token that is read twice, so that there is nothing to look back for.
    rows = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(row)) + 2 for row in range(4)])
    models = looking_back(512), looking_back(24)
    found = compare_models(
        *models, {"text": rows}, suites=["likelihood", "long_range"], size=SIZE, tokenizer=tiny_tokenizer()
    )
    assert from_json(to_json(found)) == found
    assert found.result("text").difference == 0.0
    result = found.results["long_range"]
    for task in ("repeat copy", "associative recall"):
        figure = result.figure(task)
        assert figure.teacher > 0.6 and figure.high < -0.3 and figure.p_value < 0.01
        halved = result.figure(f"{task}, length at which the student's accuracy is half of the teacher's").value
        # At 16 and 32 tokens the window holds the whole distance, from 64 on it does not.
        assert halved in (32.0, 64.0)
        curve = result.curve(task)
        assert curve.at == (16.0, 32.0, 64.0, 128.0)
        assert curve.lines["student"][0] == curve.lines["teacher"][0]
        assert curve.lines["student"][-1] < 0.2


def test_a_student_equal_to_its_teacher_differs_by_nothing() -> None:
    model, rows = tiny_model("llama"), torch.ones(2, 16, dtype=torch.long)
    found = compare_models(model, model, {"text": rows}, suites=["long_range"], size=SIZE, tokenizer=tiny_tokenizer())
    for task in TASKS:
        if task == "passkey":
            continue
        figure = found.results["long_range"].figure(task)
        assert (figure.value, figure.low, figure.high, figure.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_half_lengths() -> None:
    def both(teacher: float, student: float) -> tuple[np.ndarray, np.ndarray]:
        return np.array([teacher]), np.array([student])

    assert half_length({64: both(1.0, 0.6), 128: both(0.8, 0.3), 256: both(0.8, 0.0)}) == 128.0
    assert half_length({64: both(1.0, 0.6), 128: both(0.05, 0.0)}) is None


def test_what_is_refused() -> None:
    with pytest.raises(NotMeasured, match="vocabulary is too small"):
        writer(vocabulary=12)
    with pytest.raises(NotMeasured, match="too short for a key"):
        rows_of("passkey", writer(20), 1)
    nothing = Rows(ids=np.ones((1, 4), dtype=np.int64), asked=np.array([[False, False, True, True]]))
    assert row_accuracy(layout_of(tiny_model("llama")), nothing).shape == (1,)
