"""Continuations that teacher and student sample from the same prompts, and both models' distributions along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.data.batches import Batch
from xarch_kd.evaluation.divergences import NAMES, TokenDivergences, token_divergences
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.evaluation.sizes import Size
from xarch_kd.generation.sampling import Sampling, end_tokens, sample

if TYPE_CHECKING:
    from xarch_kd.evaluation.base import Subjects

# Rows that one model samples at a time, on a CPU and elsewhere.
CPU_ROWS: Final = 32
DEVICE_ROWS: Final = 128
SIDES: Final = ("teacher", "student")


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuations:
    """Prompts and what one model wrote after them, and both models' figures at each token that it wrote.

    `ids` [rows, prompt + time] are padded on the right with anything; `alive` [rows, time] is true at tokens that the
    model wrote, an end of sequence included; `ended` [rows]. `figures` are None for text that was not scored.
    """

    prompt: int
    ids: Tensor
    alive: Tensor
    ended: Tensor
    figures: TokenDivergences | None = None

    @property
    def written(self) -> Tensor:
        """The tokens after the prompt [rows, time]."""
        return self.ids[:, self.prompt :]

    def texts(self) -> list[list[int]]:
        """Return the tokens that each row wrote."""
        return [row[mask].tolist() for row, mask in zip(self.written, self.alive, strict=True)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts:
    """Continuations of the same prompts by both models, with the same random numbers for equal prompts."""

    teacher: Continuations
    student: Continuations


def prompts_of(texts: Sequence[Batch], size: Size) -> Tensor:
    """Return prompts [prompts, tokens] from rows of text: the start of each row, then later parts of all rows.

    Rows shorter than a prompt are left out, unless all are: then prompts are half as long as the longest row. Raises
    NotMeasured without text.
    """
    longest = max((len(row) for row in _unpadded_rows(texts)), default=0)
    if longest < 2:
        raise NotMeasured("there is no text to take prompts from", found=f"rows of at most {longest} tokens")
    return text_rows(texts, max(1, min(size.prompt_tokens, longest // 2)), size.prompts)


def text_rows(texts: Sequence[Batch], tokens: int, count: int) -> Tensor:
    """Return at most `count` pieces [pieces, tokens]: the start of each row of text, then later parts of all rows.

    They have fewer tokens where no row has as many.
    """
    rows = _unpadded_rows(texts)
    longest = max(len(row) for row in rows)
    tokens = min(tokens, longest)
    found = [
        row[start : start + tokens]
        for start in range(0, longest - tokens + 1, tokens)
        for row in rows
        if start + tokens <= len(row)
    ]
    return torch.stack(found[:count]).cpu().long()


def _unpadded_rows(texts: Sequence[Batch]) -> list[Tensor]:
    return [row for batch in texts for part in batch.apart() for row in _unpadded(part)]


def _unpadded(batch: Batch) -> list[Tensor]:
    if batch.attention_mask is None:
        return list(batch.input_ids)
    return [row[:length] for row, length in zip(batch.input_ids, batch.attention_mask.sum(1).tolist(), strict=True)]


def fitting_tokens(models: Sequence[PreTrainedModel], prompt: int, wanted: int) -> int:
    """Return how many tokens can be written after a prompt. Raises NotMeasured for fewer than two."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    allowed = min([wanted, *(limit - prompt for limit in limits if limit is not None)])
    if allowed < 2:
        raise NotMeasured(
            "a prompt leaves no room for a continuation", found=f"{prompt} tokens, positions {limits}", allowed=wanted
        )
    return allowed


def sampled(
    subjects: Subjects, side: str, prompts: Tensor, tokens: int, *, seeds: Sequence[int], temperature: float = 1.0
) -> Continuations:
    """Return what the model named `side` writes after prompts [rows, time] by pure sampling, without figures.

    `seeds` has one seed per prompt. Both models stop at the teacher's end-of-sequence tokens. Raises NotMeasured for a
    model that cannot generate, or that writes tokens outside of the other's vocabulary.
    """
    model = getattr(subjects, side)
    if not hasattr(model, "generate") or not model.can_generate():
        raise NotMeasured(f"{type(model).__name__} cannot generate")
    ends = end_tokens(subjects.teacher)
    step = CPU_ROWS if model.device.type == "cpu" else DEVICE_ROWS
    settings = Sampling(max_new_tokens=tokens, temperature=temperature)
    ids = torch.zeros(len(prompts), prompts.shape[1] + tokens, dtype=torch.long)
    ids[:, : prompts.shape[1]] = prompts
    alive = torch.zeros(len(prompts), tokens, dtype=torch.bool)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    with subjects.reporter.work(f"sampling, {side}", len(prompts), "texts") as work:
        for start in range(0, len(prompts), step):
            part = slice(start, start + step)
            found = sample(model, list(prompts[part]), settings, seed=list(seeds[part]), end_of_sequence=ends)
            width = found.input_ids.shape[1]
            ids[part, :width] = found.input_ids.cpu()
            alive[part, : width - prompts.shape[1]] = found.sampled.cpu()[:, prompts.shape[1] :]
            ended[part] = found.ended.cpu()
            work.at(min(start + step, len(prompts)))
    _check_vocabulary(subjects, ids)
    return Continuations(prompt=prompts.shape[1], ids=ids, alive=alive, ended=ended)


def scored(subjects: Subjects, found: Continuations, *, start: int | None = None, name: str = "") -> Continuations:
    """Return continuations with both models' figures at each written token, from the written token `start` on."""
    first = found.prompt if start is None else found.prompt + start
    with subjects.reporter.work(f"reading{name}, both models", 2 * found.ids.numel(), "tokens") as work:
        figures = token_divergences(*subjects.layouts, found.ids, start=first, progress=work.at)
    return Continuations(
        prompt=first, ids=found.ids, alive=found.alive[:, (start or 0) :], ended=found.ended, figures=figures
    )


def sample_both(subjects: Subjects, prompts: Tensor, tokens: int) -> Rollouts:
    """Return what both models write after the same prompts, with both models' figures along both."""
    seeds = [subjects.seed + index for index in range(len(prompts))]
    sides = {}
    for side in SIDES:
        found = sampled(subjects, side, prompts, tokens, seeds=seeds)
        sides[side] = scored(subjects, found, name=f" what the {side} wrote")
    return Rollouts(**sides)


def _check_vocabulary(subjects: Subjects, ids: Tensor) -> None:
    sizes = [len(layout.head_weight) for layout in subjects.layouts]
    if int(ids.max()) >= min(sizes):
        raise NotMeasured(
            "one model wrote a token outside of the other's vocabulary",
            found=int(ids.max()),
            allowed=f"0 to {min(sizes) - 1}",
        )


def first_token(subjects: Subjects) -> int | None:
    """Return the token from which unconditional text starts: beginning of sequence, else an end of sequence."""
    tokenizer = subjects.tokenizer
    begins = None if tokenizer is None else tokenizer.bos_token_id
    if isinstance(begins, int):
        return begins
    ends = end_tokens(subjects.teacher)
    return ends[0] if ends else None


def values_of(found: Continuations) -> dict[str, Tensor]:
    """Return the figures by name, float64 [rows, time], 0 where nothing was written."""
    if found.figures is None:
        raise ValueError("the continuations were not scored")
    return {
        name: torch.where(found.alive, getattr(found.figures, name).double(), torch.zeros((), dtype=torch.float64))
        for name in NAMES
    }
