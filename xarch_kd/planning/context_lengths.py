"""Context lengths of the suite `speed`, and problems of its settings that the configs of both models show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from xarch_kd.errors import ModelError
from xarch_kd.mapping_file.schema import Speed
from xarch_kd.models.cache_size import cache_layers, cache_size, longest_context
from xarch_kd.models.loading.load import DTYPES
from xarch_kd.taps.layout import Layout

LENGTHS: Final = (256, 1024, 4096, 16_384, 65_536)


def context_lengths(speed: Speed, teacher: Layout, student: Layout) -> tuple[int, ...]:
    """Return the lengths to measure: those that were given, or those of `LENGTHS` that both models have positions for.

    A model with fewer positions than the first of them is measured at its last position.
    """
    if speed.lengths is not None:
        return speed.lengths
    longest = longest_of_both(teacher, student)
    return tuple(length for length in LENGTHS if longest is None or length <= longest) or (longest or LENGTHS[0],)


def longest_of_both(teacher: Layout, student: Layout) -> int | None:
    """Return the most tokens that both models have positions for, None without a limit."""
    known = [longest for longest in map(longest_context, (teacher, student)) if longest is not None]
    return min(known) if known else None


def memory_bytes(speed: Speed) -> int:
    """Return the memory in which the largest batch has to fit."""
    return int(speed.memory_gib * 2**30)


def speed_problems(speed: Speed, teacher: Layout, student: Layout) -> Iterator[tuple[str, str]]:
    """Yield (key, problem) for each setting that does not fit the models."""
    for model, name in ((teacher, "teacher"), (student, "student")):
        longest = longest_context(model)
        beyond = [length for length in speed.lengths or () if longest is not None and length > longest]
        if beyond:
            shown = ", ".join(f"{length:,}" for length in beyond)
            yield "lengths", f"{shown} is beyond the {longest:,} positions of the {name}. Use at most {longest:,}."
            return
    first = context_lengths(speed, teacher, student)[0]
    for model, name in ((teacher, "teacher"), (student, "student")):
        try:
            needed = cache_size(cache_layers(model), first, DTYPES[speed.dtype])
        except ModelError:
            # Its cache is measured, if it has one.
            continue
        if needed > memory_bytes(speed):
            yield (
                "memory_gib",
                f"{memory_bytes(speed):,} bytes do not hold one sequence of {first:,} tokens: the {name}'s cache takes "
                f"{needed:,} bytes in {speed.dtype}. Use at least {needed / 2**30:.2g}.",
            )
