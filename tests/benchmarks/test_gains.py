"""Table of gains: its cells, and README's copy of the recorded one."""

from __future__ import annotations

import json

import torch

from benchmarks.gains import README, RESULTS, STUDENTS, table, with_table
from xarch_kd.evaluation.speed_suite import ContextFigures, ModelFigures, SpeedResult, speed_to_json
from xarch_kd.evaluation.timing import Timing


def figures(cache: int, seconds: float | None) -> ModelFigures:
    timing = None if seconds is None else Timing(median=seconds, low=seconds, high=seconds, repeats=3)
    return ModelFigures(cache_bytes=cache, batch=1, prefill=timing, decode=timing)


def test_a_cell_has_prefill_decoding_and_cache() -> None:
    result = SpeedResult(
        signature="",
        dtype="bfloat16",
        memory=2**30,
        contexts=(
            ContextFigures(tokens=1024, teacher=figures(2**22, 0.25), student=figures(2**21, 0.125)),
            ContextFigures(tokens=8192, teacher=figures(2**25, None), student=figures(2**24, None)),
        ),
        smaller_from=1,
        prefill_from=None,
        decode_from=None,
    )
    students = {name: {**speed_to_json(result), "gains": "smaller"} for name in ("half", "most")}
    assert table({"students": students}) == [
        "| context | teacher | half | most |",
        "|---|---|---|---|",
        "| 1,024 | 0.25 s, 250 ms, 4 MiB | 0.12 s, 125 ms, 2 MiB | 0.12 s, 125 ms, 2 MiB |",
        "| 8,192 | 32 MiB | 16 MiB | 16 MiB |",
        "",
        "All in bfloat16.",
        "half: smaller.",
        "most: smaller.",
    ]


def test_the_readme_has_the_recorded_table() -> None:
    result = json.loads(RESULTS.read_text())
    lines = table(result)
    assert list(result["students"]) == list(STUDENTS)
    assert RESULTS.with_suffix(".md").read_text().splitlines() == lines
    page = README.read_text()
    assert with_table(page, lines) == page and with_table(page, ["none"]) != page
    # Bytes are the same on every machine: keys and values of 3 heads of 64 in 30 layers.
    first = next(iter(result["students"].values()))
    for context in first["contexts"]:
        number = getattr(torch, first["dtype"]).itemsize
        assert context["teacher"]["cache_bytes"] == context["tokens"] * 30 * 2 * 3 * 64 * number
