"""Suite `speed`: bytes of cache, prefill and decoding times, and memory of teacher and student by context length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from xarch_kd.errors import ModelError, UsageError
from xarch_kd.evaluation.base import Subjects
from xarch_kd.evaluation.timing import (
    CANNOT_RUN,
    ContextTimes,
    Side,
    Times,
    Timing,
    first_line,
    signature_of,
    time_contexts,
)
from xarch_kd.models.cache_size import cache_layers, measured_size, smaller_from
from xarch_kd.models.loading.load import DTYPES
from xarch_kd.planning.context_lengths import (
    LENGTHS,
    context_lengths,
    longest_of_both,
    memory_bytes,
    speed_problems,
)
from xarch_kd.planning.render import byte_text
from xarch_kd.taps.layout import Layout, layout_of

if TYPE_CHECKING:
    from xarch_kd.evaluation.results import Evaluation

# Tokens of the pass that compares computed bytes with those of the cache, where no times are measured.
PROBE = 32


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """Figures of one model at one context length.

    `cache_bytes` are cache and state of one sequence, from the config, and `measured_bytes` those of the cache that the
    model returned. `batch` is the number of sequences whose caches fit into the memory of the settings. `prefill` is
    the time of one pass over the context, `decode` that of one token after it. `peak_bytes` are weights, cache and
    intermediate results at most. None: not known or not measured.
    """

    cache_bytes: int | None
    batch: int | None
    measured_bytes: int | None = None
    prefill: Timing | None = None
    decode: Timing | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ContextFigures:
    """Figures of both models at a context of `tokens` tokens."""

    tokens: int
    teacher: ModelFigures
    student: ModelFigures


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """Figures by context length, shortest first.

    `memory` are the bytes in which `batch` sequences fit. `smaller_from` is the context from which on the student's
    cache is smaller, up to the longest length, None for never; `prefill_from` and `decode_from` are those from which on
    it is faster, interpolated between the measured lengths. `signature` names what the times depend on, `notices` are
    what was left out and what differs.
    """

    signature: str
    dtype: str
    memory: int
    contexts: tuple[ContextFigures, ...]
    smaller_from: int | None
    prefill_from: float | None
    decode_from: float | None
    notices: tuple[str, ...] = ()

    @property
    def timed(self) -> tuple[ContextFigures, ...]:
        """The contexts at which times were measured."""
        return tuple(each for each in self.contexts if each.teacher.decode is not None)


def measure_speed(subjects: Subjects) -> SpeedResult:
    """Return bytes of cache, and times within the seconds of the settings, of both models; rounds them to its dtype.

    Models with quantized weights stay as they are. A model that does not run with a cache, or whose cache is not of the
    computed size, is named in the notices. Raises UsageError for lengths or a memory that do not fit the models.
    """
    settings, memory = subjects.speed, memory_bytes(subjects.speed)
    layouts = (
        layout_of(subjects.teacher, subjects.teacher_paths),
        layout_of(subjects.student, subjects.student_paths),
    )
    for key, problem in speed_problems(settings, *layouts):
        raise UsageError(f"evaluate.speed.{key}: {problem}")
    lengths, longest = context_lengths(settings, *layouts), longest_of_both(*layouts)
    notices = _beyond(lengths, longest) if settings.lengths is None else []
    sides = [
        Side(name, layout, DTYPES[settings.dtype]) for name, layout in zip(("teacher", "student"), layouts, strict=True)
    ]
    for side, layout in zip(sides, layouts, strict=True):
        notices += _compare_bytes(side, layout)
    teacher, student = sides
    times = Times()
    if settings.seconds:
        times = time_contexts(
            teacher, student, lengths, seconds=settings.seconds, longest=longest, reporter=subjects.reporter
        )
    contexts = []
    for tokens in lengths:
        found = times.contexts.get(tokens, (None, None))
        figures = [_figures(side, tokens, memory, part) for side, part in zip(sides, found, strict=True)]
        notices += [
            _differs(side, part.tokens, part.measured_bytes)
            for side, part in zip(sides, found, strict=True)
            if part is not None and side.layers is not None and part.measured_bytes != side.cache_bytes(part.tokens)
        ]
        contexts.append(ContextFigures(tokens=tokens, teacher=figures[0], student=figures[1]))
    smaller = None
    if teacher.layers is not None and student.layers is not None and teacher.dtype == student.dtype:
        smaller = smaller_from(student.layers, teacher.layers, lengths[-1], student.dtype)
    return SpeedResult(
        signature=signature_of(teacher, student),
        dtype=settings.dtype,
        memory=memory,
        contexts=tuple(contexts),
        smaller_from=smaller,
        prefill_from=faster_from(contexts, lambda figures: figures.prefill),
        decode_from=faster_from(contexts, lambda figures: figures.decode),
        notices=(*notices, *times.notices),
    )


def faster_from(contexts: Sequence[ContextFigures], timing: Callable[[ModelFigures], Timing | None]) -> float | None:
    """Return the context from which on the student is faster at all longer measured ones, None if it is not.

    It is interpolated between two measured lengths, or is the first of them.
    """
    points = []
    for context in contexts:
        teacher, student = timing(context.teacher), timing(context.student)
        if teacher is not None and student is not None:
            points.append((context.tokens, student.median - teacher.median))
    slower = [index for index, (_, difference) in enumerate(points) if difference >= 0]
    if not slower:
        return float(points[0][0]) if points else None
    last = slower[-1]
    if last == len(points) - 1:
        return None
    (before, above), (after, below) = points[last], points[last + 1]
    return before + (after - before) * above / (above - below)


def speed_to_json(result: SpeedResult) -> dict[str, Any]:
    """Return the result as JSON data."""
    return dataclasses.asdict(result)


def speed_from_json(data: Any) -> SpeedResult:
    """Return what `speed_to_json` was given. Raises KeyError and TypeError for something else."""
    contexts = tuple(
        ContextFigures(
            tokens=entry["tokens"], teacher=_from_json(entry["teacher"]), student=_from_json(entry["student"])
        )
        for entry in data["contexts"]
    )
    return SpeedResult(**{**data, "contexts": contexts, "notices": tuple(data["notices"])})


def speed_tables(evaluation: Evaluation) -> Iterator[RenderableType]:
    """Yield a table of one row per context length, and the lines of `gains`."""
    result = evaluation.speed
    if result is None:
        return
    yield Text(f"What is gained: teacher → student, one sequence, {result.dtype}", style="italic")
    table = Table()
    for heading in _headings(result):
        table.add_column(heading, justify="right", overflow="fold")
    for cells in _cells(result):
        table.add_row(*map(Text, cells))
    yield table
    for line in gains(result):
        yield Text(line)


def speed_markdown(evaluation: Evaluation) -> Iterator[str]:
    """Yield the lines of a table for a model card, and those of `gains`."""
    result = evaluation.speed
    if result is None:
        return
    headings = _headings(result)
    yield f"What is gained, teacher → student, one sequence, {result.dtype}:"
    yield ""
    yield f"| {' | '.join(headings)} |"
    yield "|" + "---|" * len(headings)
    for cells in _cells(result):
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "  \n".join(line.replace("|", "\\|") for line in gains(result))


def gains(result: SpeedResult) -> Iterator[str]:
    """Yield the contexts from which on the student wins, the notices, and the signature."""
    longest = result.contexts[-1].tokens
    shown = []
    if all(figures.cache_bytes for figures in (result.contexts[-1].teacher, result.contexts[-1].student)):
        shown.append(_wins("the student's cache is smaller", result.smaller_from, longest, ""))
    if result.timed:
        most = result.timed[-1].tokens
        shown.append(_wins("its prefill is faster", result.prefill_from, most, "about "))
        shown.append(_wins("its decoding is faster", result.decode_from, most, "about "))
    if shown:
        yield "; ".join(shown)
    if result.timed:
        yield f"spread of times, quartiles over median: at most {_spread(result):.0%}"
    else:
        yield "times: not measured (evaluate.speed.seconds, or xarch-kd evaluate RUN --suites speed)"
    yield from result.notices
    yield result.signature


def size_text(count: int) -> str:
    """Return bytes with three digits: `5.63 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB" if size < 999.5 else f"{size:,.0f} GiB"


def _wins(what: str, first: float | None, longest: int, about: str) -> str:
    if first is None:
        return f"{what} at no length up to {longest:,} tokens"
    return f"{what} from {about}{first:,.0f} tokens of context"


def _spread(result: SpeedResult) -> float:
    timings = (
        timing
        for context in result.timed
        for figures in (context.teacher, context.student)
        for timing in (figures.prefill, figures.decode)
    )
    return max((each.high - each.low) / each.median for each in timings if each is not None)


def _beyond(lengths: Sequence[int], longest: int | None) -> list[str]:
    """Return a notice for the default lengths that a model has no positions for."""
    left_out = [f"{length:,}" for length in LENGTHS if length not in lengths]
    return [f"left out: {', '.join(left_out)} tokens, beyond the {longest:,} positions"] if left_out else []


def _compare_bytes(side: Side, layout: Layout) -> list[str]:
    """Give `side` the sizes of its cache; return a notice if they are not known or not those of the model's cache."""
    notices = []
    try:
        side.layers = cache_layers(layout)
    except ModelError as error:
        notices.append(f"the {side.name}'s cache is not computed: {first_line(error)} ({error.found})")
    try:
        _, _, cache = side.prefill(torch.zeros(1, PROBE, dtype=torch.long, device=side.device))
    except CANNOT_RUN as error:
        return [*notices, f"the {side.name} does not run with a cache: {first_line(error)}"]
    if side.layers is not None and measured_size(cache) != side.cache_bytes(PROBE):
        notices.append(_differs(side, PROBE, measured_size(cache)))
    return notices


def _differs(side: Side, tokens: int, measured: int) -> str:
    return (
        f"the {side.name}'s cache of {tokens:,} tokens takes {measured:,} bytes, not the {side.cache_bytes(tokens):,} "
        "of its config"
    )


def _figures(side: Side, tokens: int, memory: int, times: ContextTimes | None) -> ModelFigures:
    found = side.cache_bytes(tokens) if side.layers is not None else None
    if times is None:
        return ModelFigures(cache_bytes=found, batch=_batch(found, memory))
    return ModelFigures(
        cache_bytes=found,
        batch=_batch(times.measured_bytes if found is None else found, memory),
        measured_bytes=times.measured_bytes if times.tokens == tokens else None,
        prefill=times.prefill,
        decode=times.decode,
        peak_bytes=times.peak_bytes,
    )


def _batch(size: int | None, memory: int) -> int | None:
    return None if not size else memory // size


def _from_json(data: dict[str, Any]) -> ModelFigures:
    timings = {name: Timing(**data[name]) for name in ("prefill", "decode") if data[name] is not None}
    return ModelFigures(**{**data, **timings})


def _headings(result: SpeedResult) -> tuple[str, ...]:
    always = ("context", "cache", f"sequences in {byte_text(result.memory)}")
    return (*always, "prefill", "per token", "peak memory") if result.timed else always


def _cells(result: SpeedResult) -> Iterator[tuple[str, ...]]:
    """Yield the cells of one row per context length, under `_headings`."""
    for context in result.contexts:
        both = (context.teacher, context.student)
        cells = [
            f"{context.tokens:,}",
            _pair(both, lambda figures: figures.cache_bytes or figures.measured_bytes, size_text),
            _pair(both, lambda figures: figures.batch, lambda count: f"{count:,}"),
        ]
        if result.timed:
            cells.append(_pair(both, lambda figures: figures.prefill, _seconds))
            cells.append(_pair(both, lambda figures: figures.decode, _seconds))
            cells.append(_pair(both, lambda figures: figures.peak_bytes, size_text))
        yield tuple(cells)


def _pair(
    both: tuple[ModelFigures, ModelFigures],
    value: Callable[[ModelFigures], Any],
    shown: Callable[[Any], str],
) -> str:
    values = [value(figures) for figures in both]
    if all(each is None for each in values):
        return "-"
    return " → ".join("?" if each is None else shown(each) for each in values)


def _seconds(timing: Timing) -> str:
    if timing.median < 0.9995:
        return f"{1000 * timing.median:.3g} ms"
    return f"{timing.median:.1f} s"
