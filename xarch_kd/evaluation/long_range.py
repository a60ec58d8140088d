"""Suite `long_range`: whether a model finds again what it read long before, over lengths beyond the trained one.

All tasks are rows of random tokens whose last part follows from an earlier part alone, so that no text was learned by
heart. A prediction counts as right if the model's most likely token is the row's own.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.copying import filler_text
from xarch_kd.errors import NonFiniteLoss
from xarch_kd.evaluation.base import Subjects
from xarch_kd.evaluation.cost import Cost
from xarch_kd.evaluation.divergences import head_of
from xarch_kd.evaluation.intervals import bootstrap, holm
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.evaluation.suite_result import Curve, Figure, SuiteResult, band, finite, line, signature_text
from xarch_kd.ops.streaming.logits import logits_into
from xarch_kd.taps.layout import Layout, run_base

VERSION: Final = 1
SHORTEST: Final = 16
MOST_ROWS: Final = 32
KEY_TOKENS: Final = 5
# Tokens that a model reads at a time.
BATCH_TOKENS: Final = 2048
# Accuracy that the teacher needs for half of it to mean something.
FEWEST_RIGHT: Final = 0.1
# Where no rows of text give the length of those that were trained on.
LENGTH: Final = 256

Ids = NDArray[np.int64]
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows `ids` [rows, tokens], and at which tokens `asked` [rows, tokens] the earlier part determines the token."""

    ids: Ids
    asked: NDArray[np.bool_]


class Writer:
    """Random tokens and filler of a tokenizer, for rows of one length.

    Random tokens are no special tokens, and below `vocabulary`. Raises NotMeasured for fewer than 16 of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, length: int, seed: int) -> None:
        known = np.arange(min(len(tokenizer), vocabulary))
        self.allowed = np.setdiff1d(known, np.array(sorted(tokenizer.all_special_ids), dtype=np.int64))
        if len(self.allowed) < SHORTEST:
            raise NotMeasured(
                "the vocabulary is too small for lists of different tokens",
                found=f"{len(self.allowed)} tokens that are not special",
                allowed=f"at least {SHORTEST}",
            )
        self.length, self.draw = length, np.random.default_rng([seed, length])
        text = filler_text(random.Random("filler"), 2 * length + 8)
        self._filler = np.array(tokenizer.encode(text, add_special_tokens=False)[:length], dtype=np.int64)
        self.marker = np.array(tokenizer.encode("The pass key is", add_special_tokens=False)[:8], dtype=np.int64)

    def different(self, count: int) -> Ids:
        """Return different random tokens, as many of `count` as there are."""
        return self.draw.choice(self.allowed, size=min(count, len(self.allowed)), replace=False)

    def filler(self, count: int) -> Ids:
        """Return the first tokens of sentences of common words."""
        return np.resize(self._filler, count) if count > 0 else np.zeros(0, dtype=np.int64)


def repeat_copy(writer: Writer) -> tuple[Ids, NDArray[np.bool_]]:
    """Return a list of random tokens, filler, and the list again, whose tokens after the first are predicted."""
    items = writer.different(3 * writer.length // 8)
    return _row(writer, items, items, asked=np.arange(len(items)) > 0)


def passkey(writer: Writer) -> tuple[Ids, NDArray[np.bool_]]:
    """Return filler with a marker and random tokens somewhere, and at the end the marker and the same tokens."""
    phrase = np.concatenate([writer.marker, writer.different(KEY_TOKENS)])
    room = writer.length - 2 * len(phrase)
    if room < 0:
        raise NotMeasured("rows are too short for a key", found=f"{writer.length} tokens")
    before = writer.filler(int(writer.draw.integers(room + 1)))
    asked = np.arange(len(phrase)) >= len(writer.marker)
    return _row(writer, np.concatenate([before, phrase]), phrase, asked=asked)


def associative_recall(writer: Writer) -> tuple[Ids, NDArray[np.bool_]]:
    """Return pairs of a key and a value, filler, and the pairs in another order, whose values are predicted.

    This is multi-query associative recall (Arora et al., arXiv 2312.04927).
    """
    keys = writer.different(max(2, writer.length // 8))
    pairs = np.stack([keys, writer.draw.choice(writer.allowed, size=len(keys))], 1)
    again = writer.draw.permutation(pairs)
    return _row(writer, pairs.ravel(), again.ravel(), asked=np.arange(again.size) % 2 == 1)


def induction(writer: Writer) -> tuple[Ids, NDArray[np.bool_]]:
    """Return random tokens, and at the end parts of four of them, whose last two tokens are predicted."""
    parts = max(1, writer.length // 16)
    tokens = writer.draw.choice(writer.allowed, size=writer.length - 4 * parts)
    starts = writer.draw.integers(len(tokens) - 3, size=parts)
    ends = np.concatenate([tokens[start : start + 4] for start in starts])
    return _row(writer, tokens, ends, asked=np.arange(len(ends)) % 4 >= 2)


TASKS: Final[dict[str, Callable[[Writer], tuple[Ids, NDArray[np.bool_]]]]] = {
    "repeat copy": repeat_copy,
    "passkey": passkey,
    "associative recall": associative_recall,
    "induction": induction,
}


def _row(writer: Writer, first: Ids, last: Ids, *, asked: NDArray[np.bool_]) -> tuple[Ids, NDArray[np.bool_]]:
    """Return a row of the writer's length with filler between its parts, and the tokens that are predicted."""
    ids = np.concatenate([first, writer.filler(writer.length - len(first) - len(last)), last])
    return ids, np.concatenate([np.zeros(len(ids) - len(last), dtype=np.bool_), asked])


def rows_of(task: str, writer: Writer, count: int) -> Rows:
    """Return `count` rows of a task."""
    found = [TASKS[task](writer) for _ in range(count)]
    return Rows(ids=np.stack([ids for ids, _ in found]), asked=np.stack([asked for _, asked in found]))


@torch.inference_mode()
def row_accuracy(layout: Layout, rows: Rows, progress: Callable[[int], None] | None = None) -> Array:
    """Return the share of the asked tokens of each row [rows] that the model predicts greedily from all before them.

    Raises NonFiniteLoss for a hidden state that is NaN or infinite.
    """
    head, found = head_of(layout), []
    step = max(1, BATCH_TOKENS // rows.ids.shape[1])
    for start in range(0, len(rows.ids), step):
        ids = torch.from_numpy(rows.ids[start : start + step]).to(head.weight.device)
        asked = torch.from_numpy(rows.asked[start : start + step]).to(head.weight.device)
        hidden = run_base(layout, ids)[:, :-1][asked[:, 1:]]
        if not bool(torch.isfinite(hidden).all()):
            raise NonFiniteLoss(f"a hidden state of {type(layout.model).__name__} is not finite", asked="long_range")
        guess = torch.cat([_most_likely(part, layout) for part in hidden.split(256)])
        right = torch.zeros(asked.shape, device=asked.device)
        right[asked] = (guess == ids[asked]).float()
        found.append((right.sum(1) / asked.sum(1)).double().cpu())
        if progress is not None:
            progress(ids.numel())
    return torch.cat(found).numpy()


def _most_likely(hidden: Tensor, layout: Layout) -> Tensor:
    head = head_of(layout)
    out = torch.empty(len(hidden), len(head.weight), dtype=torch.float32, device=hidden.device)
    return logits_into(out, hidden.float(), head).argmax(-1)


def lengths_of(subjects: Subjects) -> tuple[int, ...]:
    """Return the lengths of the rows, from half of a training row to four, that both models have positions for."""
    widths = [batch.input_ids.shape[1] for batches in subjects.texts.values() for batch in batches]
    row = max(widths, default=LENGTH)
    limits = [layout.model.config.get_text_config() for layout in subjects.layouts]
    most = min(
        (limit for config in limits if (limit := getattr(config, "max_position_embeddings", None))), default=None
    )
    found = sorted({max(SHORTEST, round(share * row)) for share in subjects.size.probe_shares})
    allowed = tuple(length for length in found if most is None or length <= most)
    if not allowed:
        raise NotMeasured("the models have too few positions", found=most, allowed=f"at least {found[0]}")
    return allowed


def row_count(subjects: Subjects, length: int) -> int:
    """Return the number of rows of each task at a length."""
    return min(MOST_ROWS, max(2, subjects.size.probe_tokens // length))


def long_range_cost(subjects: Subjects) -> Mapping[str, Cost]:
    """Return the work: the rows of all tasks at all lengths."""
    if subjects.tokenizer is None:
        return {}
    tokens = sum(length * row_count(subjects, length) for length in lengths_of(subjects))
    return {"long_range": Cost(read=len(TASKS) * tokens)}


def measure_long_range(subjects: Subjects) -> SuiteResult:
    """Return the accuracy of both models in each task by length, and the length at which the student's has halved.

    Raises NotMeasured without a tokenizer, and for a vocabulary or positions that are too few.
    """
    if subjects.tokenizer is None:
        raise NotMeasured("there is no tokenizer to take random tokens from")
    vocabulary = min(len(layout.head_weight) for layout in subjects.layouts)
    lengths, notices = lengths_of(subjects), []
    total = 2 * long_range_cost(subjects)["long_range"].read
    found: dict[str, dict[int, tuple[Array, Array]]] = {task: {} for task in TASKS}
    with subjects.reporter.work("finding again what was read, both models", total, "tokens") as work:
        for length in lengths:
            writer = Writer(subjects.tokenizer, vocabulary, length, subjects.seed)
            for task, by_length in found.items():
                try:
                    rows = rows_of(task, writer, row_count(subjects, length))
                except NotMeasured as error:
                    notices.append(f"{task} is not measured at {length} tokens: {error.message}")
                    continue
                teacher, student = (row_accuracy(layout, rows, work.advance) for layout in subjects.layouts)
                by_length[length] = (teacher, student)
    found = {task: by_length for task, by_length in found.items() if by_length}
    if len(lengths) < len(subjects.size.probe_shares):
        notices.append(f"no rows longer than {lengths[-1]} tokens: the models have no positions for them")
    return SuiteResult(
        signature=signature_text("long_range", VERSION, _settings(subjects, lengths)),
        figures=tuple(_figures(subjects, found)),
        curves=tuple(_curve(subjects, task, by_length) for task, by_length in found.items()),
        notices=tuple(notices),
    )


def _settings(subjects: Subjects, lengths: Sequence[int]) -> dict[str, object]:
    return {
        "lengths": ",".join(map(str, lengths)),
        "rows": ",".join(str(row_count(subjects, length)) for length in lengths),
        "right": "greedy",
        "interval": f"rows {subjects.level:g}",
        "seed": subjects.seed,
    }


def _figures(subjects: Subjects, found: Mapping[str, Mapping[int, tuple[Array, Array]]]) -> Iterator[Figure]:
    """Yield the mean accuracy over all lengths of each task, p-values adjusted for all tasks, and its half-length."""
    figures = {}
    for task, by_length in found.items():
        gaps = np.concatenate([student - teacher for teacher, student in by_length.values()])
        # Each length counts the same, however many rows it has.
        shares = np.concatenate([np.full(len(teacher), 1 / len(teacher)) for teacher, _ in by_length.values()])
        (gap,) = bootstrap(
            lambda weights, gaps=gaps, shares=shares: (weights @ (gaps * shares) / (weights @ shares))[:, None],
            len(gaps),
            level=subjects.level,
            resamples=subjects.resamples,
            seed=subjects.seed,
            strata=[len(teacher) for teacher, _ in by_length.values()],
        )
        teacher, student = (float(np.mean([each[side].mean() for each in by_length.values()])) for side in (0, 1))
        figures[task] = Figure(
            name=task,
            better="higher",
            compared="difference",
            teacher=teacher,
            student=student,
            value=gap.value,
            low=finite(gap.low),
            high=finite(gap.high),
            p_value=gap.p_value,
            ceiling=0.0,
            count=len(gaps),
            of="rows",
        )
    p_values = holm({task: 1.0 if each.p_value is None else each.p_value for task, each in figures.items()})
    for task, figure in figures.items():
        yield dataclasses.replace(figure, p_value=None if figure.p_value is None else p_values[task])
        yield Figure(
            name=f"{task}, length at which the student's accuracy is half of the teacher's",
            better="higher",
            compared="value",
            unit="tokens",
            value=half_length(found[task]),
            count=figure.count,
            of="rows",
        )


def half_length(by_length: Mapping[int, tuple[Array, Array]]) -> float | None:
    """Return the first length at which the student has less than half of the teacher's accuracy, None for no such one.

    Lengths at which the teacher itself has less than 0.1 do not count.
    """
    for length, (teacher, student) in by_length.items():
        if teacher.mean() >= FEWEST_RIGHT and student.mean() < teacher.mean() / 2:
            return float(length)
    return None


def _curve(subjects: Subjects, task: str, by_length: Mapping[int, tuple[Array, Array]]) -> Curve:
    lines, bands = {}, {}
    for side, name in enumerate(("teacher", "student")):
        values = [each[side] for each in by_length.values()]
        intervals = [
            bootstrap(
                lambda weights, rows=rows: (weights @ rows / weights.sum(1))[:, None],
                len(rows),
                level=subjects.level,
                resamples=subjects.resamples,
                seed=subjects.seed,
            )[0]
            for rows in values
        ]
        lines[name] = line(each.value for each in intervals)
        bands[name] = band(
            [np.nan if each.low is None else each.low for each in intervals],
            [np.nan if each.high is None else each.high for each in intervals],
        )
    return Curve(
        name=task, x="tokens of the row", unit="accuracy", at=tuple(map(float, by_length)), lines=lines, bands=bands
    )
