"""Copying: greedy accuracy of a model on lists of random tokens that it has read before."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.data.copying import copy_rows, filler_text
from xarch_kd.errors import DataError, NonFiniteLoss
from xarch_kd.evaluation.base import Subjects
from xarch_kd.evaluation.likelihood import ModelPaths
from xarch_kd.evaluation.statistics import LEVEL, RESAMPLES, paired_bootstrap
from xarch_kd.ops.heads import Head
from xarch_kd.ops.streaming.logits import logits_into
from xarch_kd.run.report import Reporter
from xarch_kd.taps.layout import layout_of, run_base

if TYPE_CHECKING:
    from xarch_kd.evaluation.results import Evaluation

# Tokens of a list, and of the filler between the list and its repetition.
ITEMS: Final = 48
FILLER: Final = 64


@dataclass(frozen=True, kw_only=True)
class CopyRows:
    """Rows [rows, T] of a list of `items` random tokens, filler, and the same list."""

    ids: Tensor
    items: int


@dataclass(frozen=True, kw_only=True)
class CopyingResult:
    """Share of the second list's tokens, after its first, that each model predicts greedily.

    `difference` is student - teacher, `low` and `high` its bootstrap interval over lists, None for a single one.
    """

    lists: int
    items: int
    filler: int
    teacher: float
    student: float
    difference: float
    low: float | None
    high: float | None

    @property
    def ratio(self) -> float | None:
        """The student's accuracy over the teacher's, None where the teacher copies nothing."""
        return self.student / self.teacher if self.teacher > 0 else None

    def line(self) -> str:
        """Return the result as one line."""
        interval = "" if self.low is None or self.high is None else f" ({self.low:+.3f} to {self.high:+.3f})"
        share = "" if self.ratio is None else f", {self.ratio:.0%} of the teacher's"
        return (
            f"copying: teacher {self.teacher:.3f}, student {self.student:.3f}{share}; difference "
            f"{self.difference:+.3f}{interval}; greedy accuracy on the second of two equal lists of {self.items} "
            f"random tokens with {self.filler} tokens between them, {self.lists} lists"
        )


def copying_rows(
    tokenizer: PreTrainedTokenizerBase, *, lists: int, vocabulary: int, items: int = ITEMS, filler: int = FILLER
) -> CopyRows:
    """Return `lists` rows [lists, items + filler + items] of random ids below `vocabulary` that are no special tokens.

    The filler is the same in each row: sentences of common words. Raises DataError for a vocabulary of fewer tokens
    than a list has.
    """
    between = tokenizer.encode(filler_text(random.Random("filler"), 2 * filler), add_special_tokens=False)[:filler]
    excluded = set(tokenizer.all_special_ids)
    known = min(len(tokenizer), vocabulary)
    if known - len(excluded) < items:
        raise DataError(
            "copying cannot be measured: the vocabulary is smaller than a list of different tokens",
            found=f"{known} tokens, {len(excluded)} of them special",
            allowed=f"at least {items} others",
            fix="set evaluate.copying: 0",
        )
    ids = copy_rows(known, between, rows=lists, items=items, excluded=excluded)
    return CopyRows(ids=torch.from_numpy(ids), items=items)


@torch.inference_mode()
def copied_tokens(
    model: PreTrainedModel,
    rows: CopyRows,
    *,
    batch_size: int = 4,
    paths: ModelPaths = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return which tokens of each second list, after its first, the model predicts greedily.

    The result is float32 [rows, items - 1] on the CPU, 1 where the prediction is right, each from all true tokens
    before it. The model is in evaluation mode. `progress` is called with the number of tokens read so far. Raises
    NonFiniteLoss for a hidden state that is NaN or infinite.
    """
    layout = layout_of(model, paths)
    weight, items = layout.head_weight, rows.items
    head = Head(weight, layout.head_bias, layout.logit_scale, layout.logit_softcap)
    training = model.training
    model.eval()
    try:
        found: list[Tensor] = []
        for start in range(0, len(rows.ids), batch_size):
            ids = rows.ids[start : start + batch_size].to(weight.device)
            hidden = run_base(layout, ids, None, None)[:, -items:-1].flatten(0, 1)
            if not bool(torch.isfinite(hidden).all()):
                raise NonFiniteLoss(f"a hidden state of {type(model).__name__} is not finite", asked="copying")
            logits = torch.empty(len(hidden), weight.shape[0], dtype=torch.float32, device=weight.device)
            guess = logits_into(logits, hidden.float(), head).argmax(-1).view(len(ids), items - 1)
            found.append((guess == ids[:, -items + 1 :]).float().cpu())
            if progress is not None:
                progress(min(start + batch_size, len(rows.ids)) * rows.ids.shape[1])
    finally:
        model.train(training)
    return torch.cat(found)


def compare_copying(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    rows: CopyRows,
    *,
    teacher_paths: ModelPaths = None,
    student_paths: ModelPaths = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> CopyingResult:
    """Return the copying accuracy of teacher and student on the same rows. Raises as `copied_tokens`."""
    found = []
    for model, words, paths in ((teacher, "teacher", teacher_paths), (student, "student", student_paths)):
        work = (reporter or Reporter.silent()).work(f"measuring copying, {words}", rows.ids.numel(), "tokens")
        with work as shown:
            found.append(copied_tokens(model, rows, paths=paths, progress=shown.at))
    difference = paired_bootstrap(found[0], found[1], level=LEVEL, resamples=RESAMPLES, seed=seed)
    return CopyingResult(
        lists=len(rows.ids),
        items=rows.items,
        filler=rows.ids.shape[1] - 2 * rows.items,
        teacher=float(found[0].mean()),
        student=float(found[1].mean()),
        difference=difference.mean,
        low=difference.low,
        high=difference.high,
    )


def measure_copying(subjects: Subjects) -> CopyingResult | None:
    """Return the copying accuracy of both models; None, with a line, where their positions or ids do not allow it."""
    models = (subjects.teacher, subjects.student)
    if subjects.copying == 0 or subjects.tokenizer is None:
        return None
    vocabulary = min(int(model.get_input_embeddings().weight.shape[0]) for model in models)  # type: ignore[arg-type]
    try:
        rows = copying_rows(subjects.tokenizer, lists=subjects.copying, vocabulary=vocabulary)
    except DataError as error:
        subjects.reporter.line(f"warning: {error.message} ({error.found})")
        return None
    positions = [getattr(model.config, "max_position_embeddings", None) for model in models]
    if any(known is not None and known < rows.ids.shape[1] for known in positions):
        subjects.reporter.line(
            f"warning: copying is not measured: its rows have {rows.ids.shape[1]} tokens, more than positions"
        )
        return None
    return compare_copying(
        *models,
        rows,
        teacher_paths=subjects.teacher_paths,
        student_paths=subjects.student_paths,
        seed=subjects.seed,
        reporter=subjects.reporter,
    )


def copying_lines(evaluation: Evaluation) -> Iterator[Text]:
    """Yield the result as one line to print."""
    if evaluation.copying is not None:
        yield Text(evaluation.copying.line())


def copying_markdown(evaluation: Evaluation) -> Iterator[str]:
    """Yield the result as a sentence of a model card."""
    if evaluation.copying is not None:
        yield f"{evaluation.copying.line().capitalize()}."
