"""Curves read from a growing events.jsonl, and their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.run.curves import CurveReader
from xarch_kd.run.plot import curve_plot, sparkline


def step(number: int, loss: float, stage: str = "mixers", **parts: float) -> dict[str, Any]:
    named = {name.replace("_", "."): value for name, value in parts.items()}
    return {"time": number, "event": "step", "stage": stage, "step": number, "steps": 4, "loss": loss, "parts": named}


def append(path: Path, *events: Any, end: str = "\n") -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events[:-1]) + json.dumps(events[-1]) + end)


def test_lines_are_read_as_they_are_written_and_a_half_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = CurveReader(path)
    reader.update()
    assert reader.stages == {}
    append(path, {"event": "started"}, step(1, 3.0, a_0=1.0, a_1=2.0))
    evaluation = {"event": "evaluation", "stage": "mixers", "step": 1, "loss": 2.5, "nll": 4.0}
    text = json.dumps(evaluation)
    with path.open("a") as file:
        file.write(text[:20])
    reader.update()
    mixers = reader.stages["mixers"]
    assert (mixers.loss, mixers.parts, mixers.held_out) == ({1: 3.0}, {"a": {1: 3.0}}, {})
    with path.open("a") as file:
        file.write(text[20:] + "\n")
    append(path, step(2, 2.0, a_0=2.0), step(1, 1.0, stage="logits"))
    reader.update()
    assert (mixers.loss, mixers.held_out, mixers.nll) == ({1: 3.0, 2: 2.0}, {1: 2.5}, {1: 4.0})
    assert list(reader.stages) == ["mixers", "logits"] and reader.skipped == 0


def test_steps_that_a_resumed_run_takes_again_replace_the_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append(path, *(step(number, float(number)) for number in (1, 2, 3)))
    append(path, {"event": "resumed", "stage": "mixers", "step": 1}, step(2, 20.0))
    reader = CurveReader(path)
    reader.update()
    assert reader.stages["mixers"].loss == {1: 1.0, 2: 20.0}


def test_damaged_lines_and_figures_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append(path, step(1, 1.0), step(2, float("nan")), {"event": "step", "stage": "mixers"}, ["no", "event"])
    path.write_bytes(path.read_bytes() + b"\xff\xfe{\n\n")
    append(path, step(3, 3.0, stage="\x1b[31mred"))
    reader = CurveReader(path)
    reader.update()
    assert reader.stages["mixers"].loss == {1: 1.0}
    assert reader.skipped == 3
    assert list(reader.stages) == ["mixers", "?[31mred"]


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append(path, step(1, 1.0), step(2, 2.0))
    reader = CurveReader(path)
    reader.update()
    path.unlink()
    append(path, step(1, 5.0))
    reader.update()
    assert reader.stages["mixers"].loss == {1: 5.0}


def test_a_falling_line_falls_from_corner_to_corner() -> None:
    plot = curve_plot({1: 1.0, 5: 0.5, 9: 0.0}, {}, last=9, width=19, height=4)
    lines = plot.plain.split("\n")
    # 8 columns of 2 dots, 4 lines of 4: the diagonal.
    assert lines[0] == "        1 │⠑⢄      "
    assert lines[3] == "        0 │      ⠑⢄"
    assert lines[4].split() == ["1", "step", "9"]


def test_marks_stand_at_their_value_and_wide_ranges_are_logarithmic() -> None:
    line = {1: 1000.0, 2: 10.0, 3: 0.1}
    lines = curve_plot(line, {3: 10.0}, last=3, width=22, height=5, ascii_only=True).plain.split("\n")
    assert [number for number, text in enumerate(lines[:5]) if "o" in text] == [2]
    assert lines[2].endswith("o") and lines[5].split()[0] == "log"
    assert lines[0].split()[0] == "1000" and lines[4].split()[0] == "0.1"
    assert set("".join(text[11:] for text in lines[:5])) == {"*", "o", " "}


@pytest.mark.parametrize("curve", [{}, {1: 2.0}, {1: 2.0, 2: 2.0}, {7: -1.0, 900: 0.0}])
def test_any_curve_can_be_drawn(curve: dict[int, float]) -> None:
    for width in (5, 40):
        assert len(curve_plot(curve, curve, last=900, width=width, height=3).plain.split("\n")) == 4
        assert len(sparkline(curve, width=width)) == min(len(curve), width)


def test_a_sparkline_has_a_block_per_value_until_they_share_one() -> None:
    assert sparkline({1: 0.0, 2: 7.0, 9: 3.0}, width=10) == "▁█▄"
    assert sparkline({number: float(number) for number in range(101, 117)}, width=4) == "▁▃▆█"
    assert sparkline({1: 0.0, 2: 7.0}, width=10, ascii_only=True) == "_#"
