"""Generation: answers by likelihood and by writing against the models' own logits, and a bias towards a letter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from xarch_kd.evaluation.base import Subjects
from xarch_kd.evaluation.choices import Question, answers, continuation_questions, letter_questions
from xarch_kd.evaluation.evaluate import compare_models
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.evaluation.results import from_json, to_json
from xarch_kd.evaluation.sizes import Size
from xarch_kd.taps.layout import layout_of
from xarch_kd.testing.markov import never_ending
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

SIZE = Size(prompts=12, prompt_tokens=8, new_tokens=6, unconditional=2, swaps=(), probe_tokens=64)
ROWS = torch.randint(40, 97, (12, 20), generator=torch.Generator().manual_seed(0))


def test_questions_have_one_right_answer_and_every_letter_is_right_equally_often() -> None:
    tokenizer = tiny_tokenizer()
    for question in (found := letter_questions(tokenizer, 8, 0)):
        text = str(tokenizer.decode(list(question.prompt)))
        listed = text.split(".")[0].removeprefix("The list: ").split(", ")
        lines = dict(line.split(". ") for line in text.splitlines()[2:6])
        assert [letter for letter, word in lines.items() if word in listed] == ["ABCD"[question.answer]]
        assert [str(tokenizer.decode(list(option))) for option in question.options] == list("ABCD")
    assert [question.answer for question in found] == [0, 1, 2, 3] * 2
    for index, question in enumerate(continuation_questions(ROWS)):
        assert (*question.prompt, *question.options[question.answer]) == tuple(ROWS[index].tolist())
        assert len(set(question.options)) == 4
    with pytest.raises(NotMeasured, match="too little text"):
        continuation_questions(ROWS[:1].repeat(6, 1))


def test_answers_are_those_of_the_models_own_logits() -> None:
    model = never_ending(tiny_model("llama", eos_token_id=None))
    questions = [
        Question(
            prompt=tuple(row[:4].tolist()),
            options=tuple(tuple(ROWS[other, :3].tolist()) for other in range(4)),
            answer=0,
        )
        for row in ROWS[4:]
    ]
    with torch.no_grad():
        sums, written = [], []
        for question in questions:
            rows = torch.tensor([[*question.prompt, *option] for option in question.options])
            log_probs = model(rows).logits.log_softmax(-1)[:, 3:-1]
            sums.append(log_probs.gather(-1, rows[:, 4:, None]).sum((1, 2)))
            ids = torch.tensor([question.prompt])
            for _ in range(3):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            written.append(ids[0, 4:].tolist())
    # The first question gets the option that the model writes, the second one with the first token of two of them.
    questions[0] = Question(
        prompt=questions[0].prompt, options=(*questions[0].options[:3], tuple(written[0])), answer=3
    )
    double = (written[1][0], 1, 1), (written[1][0], 2, 2)
    questions[1] = Question(prompt=questions[1].prompt, options=(*double, *questions[1].options[2:]), answer=0)
    subjects = Subjects(teacher=model, student=model)
    found = answers(subjects, 0, questions, lambda count: None)
    assert found.likelihood[2:].tolist() == [int(each.argmax()) for each in sums[2:]]
    assert found.writing[0] == 3 and found.writing[1] == -1
    starts = {option[0] for option in questions[2].options}
    for tokens, chosen in zip(written[2:], found.writing[2:], strict=True):
        assert (chosen >= 0) == (tokens[0] in starts)


def favoring(letter: str) -> PreTrainedModel:
    """Return a Llama that answers with `letter` after a colon and a space, and is as it was everywhere else."""
    model, tokenizer = tiny_model("llama", seed=3), tiny_tokenizer()
    colon, space, favored = (tokenizer.encode(text)[0] for text in (":", " ", letter))
    direction = layout_of(model).head_weight[favored].detach()
    inner = model.model.forward

    def forward(input_ids: torch.Tensor | None = None, **inputs: object) -> object:
        output = inner(input_ids=input_ids, **inputs)
        assert input_ids is not None
        asked = (input_ids[:, 1:] == space) & (input_ids[:, :-1] == colon)
        output[0][:, 1:][asked] += 30 * direction / direction.norm()
        return output

    model.model.forward = forward
    return model


def test_a_bias_towards_a_letter_is_found_here_and_not_by_likelihood() -> None:
    teacher, student = tiny_model("llama", seed=3), favoring("B")
    found = compare_models(
        teacher, student, {"text": ROWS}, suites=["likelihood", "generation"], size=SIZE, tokenizer=tiny_tokenizer()
    )
    assert from_json(to_json(found)) == found
    assert found.result("text").difference == 0.0
    result = found.results["generation"]
    bias = result.figure("letter bias")
    assert bias.student == pytest.approx(0.75) and bias.low > 0 and bias.p_value < 0.05
    assert result.curve("answers by letter").lines["student"] == (0.0, 1.0, 0.0, 0.0)
    assert result.curve("answers by letter").lines["right answers"] == (0.25, 0.25, 0.25, 0.25)
    assert result.figure("letters by writing").student == pytest.approx(0.25)
    assert result.figure("letters, likelihood minus writing").student == pytest.approx(0.0)
    for name in ("continuations by likelihood", "continuations by writing", "length", "texts that end"):
        assert result.figure(name).value == 0.0 and result.figure(name).p_value == 1.0
    assert len(result.samples) == 4
    assert result.samples[0].prompt == tiny_tokenizer().decode(ROWS[0, :8])
    assert result.samples[0].teacher == result.samples[0].student


def test_texts_that_end_at_once_are_counted() -> None:
    model = tiny_model("llama")
    ends = tiny_model("llama")
    ends.lm_head.bias = torch.nn.Parameter(100.0 * (torch.arange(97) == 0).float())
    result = compare_models(model, ends, {"text": ROWS}, suites=["generation"], size=SIZE).results["generation"]
    assert result.figure("texts that end").student == 1.0 and result.figure("length").student == 1.0
    assert any("12 of the student are empty" in notice for notice in result.notices)
    assert any("letters are not asked: there is no tokenizer" in notice for notice in result.notices)
    assert np.isclose(result.figure("length").value, 1.0 - result.figure("length").teacher)
