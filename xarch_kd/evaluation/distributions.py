"""Both models' next-token distributions on the same text: divergences, agreement, bits per byte, and use of context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xarch_kd.evaluation.divergences import TokenDivergences, token_divergences
from xarch_kd.evaluation.intervals import Interval, bootstrap
from xarch_kd.evaluation.rollouts import text_rows
from xarch_kd.evaluation.suite_result import Curve, Figure, SuiteResult, finite, line, signature_text

if TYPE_CHECKING:
    from xarch_kd.evaluation.base import Subjects

VERSION: Final = 1
# Tokens of text that both models read, in tokens of a probe.
PROBES: Final = 4
# Contexts of the same target tokens, in shares of a row; the targets are its last quarter.
TARGETS: Final = 0.25
CONTEXTS: Final = (1 / 16, 1 / 4)
# Nats that a key token of the teacher gains from a long context, at least (LongPPL, arXiv 2410.23771).
KEY_GAIN: Final = 2.0
FEWEST_TOKENS: Final = 8

Array = NDArray[np.float64]


def measure_distributions(subjects: Subjects) -> SuiteResult | None:
    """Return divergences of the first text, and how much each model gains from context; None for rows of few tokens."""
    widest = max(batch.input_ids.shape[1] for batch in subjects.first_text)
    if widest < FEWEST_TOKENS:
        return None
    count = max(2, PROBES * subjects.size.probe_tokens // widest)
    rows = text_rows(subjects.first_text, widest, count)
    if len({len(layout.head_weight) for layout in subjects.layouts}) > 1 and int(rows.max()) >= min(
        len(layout.head_weight) for layout in subjects.layouts
    ):
        return None
    width = rows.shape[1]
    targets = max(2, round(TARGETS * width))
    contexts = sorted({max(1, round(share * width)) for share in CONTEXTS if share * width + targets < width})
    total = 2 * len(rows) * (width + sum(context + targets for context in contexts))
    with subjects.reporter.work("comparing distributions, both models", total, "tokens") as work:
        whole = _divergences(subjects, rows, 1, work.advance)
        short = {
            context: _divergences(subjects, rows[:, width - targets - context :], context, work.advance)
            for context in contexts
        }
    notices: list[str] = []
    figures = [*_figures(subjects, whole), *_bits(subjects, rows, whole)]
    figures += _context_use(subjects, whole, short, targets, notices)
    at = (*contexts, width - targets)
    lines = {}
    for side in ("teacher", "student"):
        values = [getattr(each, f"{side}_nll").mean() for each in short.values()]
        lines[side] = line([*values, getattr(whole, f"{side}_nll")[:, -targets:].mean()])
    settings = {"rows": len(rows), "tokens": width, "targets": targets, "interval": f"rows {subjects.level:g}"}
    return SuiteResult(
        signature=signature_text("distributions", VERSION, settings),
        figures=tuple(figures),
        curves=(
            Curve(
                name="NLL of the same tokens by context",
                x="tokens of context",
                unit="nats per token",
                at=tuple(map(float, at)),
                lines=lines,
            ),
        ),
        notices=tuple(notices),
    )


def _divergences(subjects: Subjects, rows: Tensor, start: int, advance: Callable[[int], None]) -> TokenDivergences:
    found = token_divergences(*subjects.layouts, rows, start=start)
    advance(2 * rows.numel())
    return found


def _interval(subjects: Subjects, sums: Array, counts: Array) -> Interval:
    """Return the interval of the mean per token over rows, from sums and numbers of tokens [rows]."""
    # Rows without such a token do not count: resamples of them alone would have no mean.
    counting = counts != 0
    sums, counts = sums[counting], counts[counting]
    (found,) = bootstrap(
        lambda weights: (weights @ sums / (weights @ counts))[:, None],
        len(sums),
        level=subjects.level,
        resamples=subjects.resamples,
        seed=subjects.seed,
    )
    return found


def _figures(subjects: Subjects, whole: TokenDivergences) -> Iterator[Figure]:
    """Yield divergences, agreement of the most likely tokens, and tokens that only one model predicts."""
    teacher, student = whole.teacher_right.bool(), whole.student_right.bool()
    values = {
        "forward KL": (whole.forward_kl, "nats per token", "lower", 0.0),
        "reverse KL": (whole.reverse_kl, "nats per token", "lower", 0.0),
        "Jensen-Shannon": (whole.jensen_shannon, "nats per token", "lower", 0.0),
        "total variation": (whole.total_variation, "", "lower", 0.0),
        "same most likely token": (whole.agree, "", "higher", 1.0),
        "flips: right for the teacher alone": ((teacher & ~student).float(), "", "lower", 0.0),
        "flips: right for the student alone": ((student & ~teacher).float(), "", "lower", 0.0),
    }
    for name, (value, unit, better, ceiling) in values.items():
        sums = value.double().sum(1).numpy()
        found = _interval(subjects, sums, np.full(len(sums), float(value.shape[1])))
        yield Figure(
            name=name,
            better=better,  # type: ignore[arg-type]  # one of the three words
            compared="value",
            unit=unit,
            value=finite(found.value),
            low=finite(found.low),
            high=finite(found.high),
            ceiling=ceiling,
            count=len(sums),
            of="rows",
        )


def _bits(subjects: Subjects, rows: Tensor, whole: TokenDivergences) -> Iterator[Figure]:
    """Yield bits per byte of the text, which do not depend on the tokenizer; nothing without one."""
    if subjects.tokenizer is None:
        return
    texts = subjects.tokenizer.batch_decode(rows[:, 1:], clean_up_tokenization_spaces=False)
    sizes = np.array([max(1, len(str(text).encode("utf-8"))) for text in texts], dtype=np.float64)
    teacher, student = (
        getattr(whole, f"{side}_nll").double().sum(1).numpy() / math.log(2) for side in ("teacher", "student")
    )
    gap = _interval(subjects, student - teacher, sizes)
    yield Figure(
        name="bits per byte",
        better="lower",
        compared="difference",
        unit="bits per byte",
        teacher=float(teacher.sum() / sizes.sum()),
        student=float(student.sum() / sizes.sum()),
        value=gap.value,
        low=finite(gap.low),
        high=finite(gap.high),
        p_value=gap.p_value,
        ceiling=0.0,
        count=len(sizes),
        of="rows",
    )


def _context_use(
    subjects: Subjects, whole: TokenDivergences, short: dict[int, TokenDivergences], targets: int, notices: list[str]
) -> Iterator[Figure]:
    """Yield the share of the teacher's gain from context that the student has, and the KL at key tokens."""
    if not short:
        return
    context, shortest = min(short.items())
    gains = [
        getattr(shortest, f"{side}_nll").double() - getattr(whole, f"{side}_nll")[:, -targets:].double()
        for side in ("teacher", "student")
    ]
    teacher, student = (gain.mean(1).numpy() for gain in gains)
    check = _interval(subjects, teacher, np.ones(len(teacher)))
    if check.low is None or check.low <= 0:
        notices.append("no share of the gain from context: the teacher's own gain may be 0 on these rows")
    else:
        share = _interval(subjects, student, teacher)
        yield Figure(
            name=f"gain from more than {context} tokens of context, share of the teacher's",
            better="higher",
            compared="ratio",
            teacher=float(teacher.mean()),
            student=float(student.mean()),
            value=share.value,
            low=finite(share.low),
            high=finite(share.high),
            ceiling=1.0,
            count=len(teacher),
            of="rows",
        )
    key = (gains[0] >= KEY_GAIN).double()
    if not bool(key.any()):
        notices.append(f"no key token: none of {key.numel()} gains {KEY_GAIN:g} nats from context for the teacher")
        return
    kl = whole.forward_kl[:, -targets:].double()
    found = _interval(subjects, (kl * key).sum(1).numpy(), key.sum(1).numpy())
    yield Figure(
        name="forward KL at key tokens",
        better="lower",
        compared="value",
        unit="nats per token",
        value=finite(found.value),
        low=finite(found.low),
        high=finite(found.high),
        ceiling=0.0,
        count=int(key.sum()),
        of="tokens",
    )
