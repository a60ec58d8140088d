"""Questions that a model answers by likelihood and by writing, so that the two can be compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.data.batches import Batch
from xarch_kd.data.copying import WORDS
from xarch_kd.evaluation.divergences import head_of
from xarch_kd.evaluation.likelihood import ModelPaths, token_nll
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.generation.sampling import Sampling, end_tokens, sample
from xarch_kd.ops.streaming.logits import logits_into
from xarch_kd.taps.layout import Layout, run_base

if TYPE_CHECKING:
    from xarch_kd.evaluation.base import Subjects

OPTIONS: Final = 4
LETTERS: Final = "ABCD"
# Tokens of a continuation of text that is to be chosen.
CONTINUATION: Final = 8
BATCH: Final = 16

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, options of which each is a list of tokens, and the number of the right one."""

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    answer: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Number of the option [questions] that a model chose by likelihood, and by writing, -1 for no option."""

    likelihood: Ids
    writing: Ids


def continuation_questions(rows: Tensor, *, options: int = OPTIONS) -> list[Question]:
    """Return questions on rows of text [rows, tokens]: the row's own end, or that of one of the next rows.

    Rows whose ends are equal are left out. Raises NotMeasured for fewer rows than options.
    """
    tokens = min(CONTINUATION, rows.shape[1] // 2)
    ends = [tuple(row[-tokens:].tolist()) for row in rows]
    found = []
    for index, row in enumerate(rows):
        others = [ends[(index + step) % len(rows)] for step in range(1, options)]
        choices = [ends[index], *others]
        if len(set(choices)) < options:
            continue
        answer = index % options
        choices[0], choices[answer] = choices[answer], choices[0]
        found.append(Question(prompt=tuple(row[:-tokens].tolist()), options=tuple(choices), answer=answer))
    if len(found) < 2:
        raise NotMeasured(
            "there is too little text for questions on it", found=f"{len(rows)} rows", allowed=options + 1
        )
    return found


def letter_questions(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Question]:
    """Return multiple-choice questions that four letters answer: which of four words was in a list.

    Each letter is right equally often. Raises NotMeasured for a tokenizer whose letters are not one token each.
    """
    options = [tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in LETTERS]
    shared = len({option[0] for option in options}) < OPTIONS
    if shared:
        # A token for the space alone: it belongs to the prompt.
        options = [option[1:] for option in options]
    if any(len(option) != 1 for option in options) or len({option[0] for option in options}) < OPTIONS:
        raise NotMeasured("the tokenizer has no single tokens for the letters A to D", found=options)
    draw, found = random.Random(f"letters {seed}"), []
    for index in range(count):
        words = draw.sample(WORDS, 6)
        answer = index % OPTIONS
        choices = words[3:]
        choices.insert(answer, draw.choice(words[:3]))
        lines = "\n".join(f"{letter}. {word}" for letter, word in zip(LETTERS, choices, strict=True))
        text = f"The list: {', '.join(words[:3])}.\nWhich word is in the list?\n{lines}\nAnswer:{' ' if shared else ''}"
        prompt = tuple(tokenizer.encode(text, add_special_tokens=False))
        found.append(Question(prompt=prompt, options=tuple(map(tuple, options)), answer=answer))
    return found


def answers(subjects: Subjects, side: int, questions: Sequence[Question], progress: Callable[[int], None]) -> Answers:
    """Return what the teacher (side 0) or the student (1) answers.

    By likelihood it is the option of the highest log-probability, all of one length. By writing the model continues
    the prompt greedily, and its answer is the option that begins with the same tokens: the one with most of them, -1 if
    no option shares the first token or several are as near.
    """
    model = (subjects.teacher, subjects.student)[side]
    paths = (subjects.teacher_paths, subjects.student_paths)[side]
    tokens = len(questions[0].options[0])
    likelihood = (
        _by_next_token(subjects.layouts[side], questions, progress)
        if tokens == 1
        else _by_likelihood(model, paths, questions, progress)
    )
    written = sample(
        model,
        [question.prompt for question in questions],
        Sampling(max_new_tokens=tokens, temperature=0),
        batch_size=BATCH,
        end_of_sequence=end_tokens(subjects.teacher),
    ).completions()
    progress(len(questions))
    chosen = [_nearest(found, question) for found, question in zip(written, questions, strict=True)]
    return Answers(likelihood=likelihood, writing=np.array(chosen))


def _nearest(found: Sequence[int], question: Question) -> int:
    shared = []
    for option in question.options:
        length = 0
        while length < min(len(found), len(option)) and found[length] == option[length]:
            length += 1
        shared.append(length)
    best = max(shared)
    return -1 if best == 0 or shared.count(best) > 1 else shared.index(best)


@torch.inference_mode()
def _by_next_token(layout: Layout, questions: Sequence[Question], progress: Callable[[int], None]) -> Ids:
    """Return the most likely option [questions] of those that are one token each, from one pass per question."""
    head, chosen = head_of(layout), []
    for question in questions:
        ids = torch.tensor([question.prompt], device=head.weight.device)
        hidden = run_base(layout, ids)[0, -1:].float()
        logits = logits_into(torch.empty(1, len(head.weight), device=hidden.device), hidden, head)[0]
        chosen.append(int(logits[[option[0] for option in question.options]].argmax()))
        progress(1)
    return np.array(chosen)


def _by_likelihood(
    model: PreTrainedModel, paths: ModelPaths, questions: Sequence[Question], progress: Callable[[int], None]
) -> Ids:
    """Return the option of the highest log-probability [questions]."""
    chosen = np.zeros(len(questions), dtype=np.int64)
    by_length: dict[int, list[int]] = {}
    for index, question in enumerate(questions):
        by_length.setdefault(len(question.prompt), []).append(index)
    for length, members in by_length.items():
        rows = torch.tensor([[*questions[i].prompt, *option] for i in members for option in questions[i].options])
        labels = torch.where(torch.arange(rows.shape[1]) >= length, rows, -100)
        batches = [
            Batch(input_ids=ids, labels=kept, origin="questions")
            for ids, kept in zip(rows.split(BATCH), labels.split(BATCH), strict=True)
        ]
        nll = token_nll(model, batches, paths=paths).nansum(1).view(len(members), -1)
        chosen[members] = nll.argmin(1).numpy()
        progress(len(members))
    return chosen
