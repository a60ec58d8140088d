"""Progress: plain lines where there is no terminal, a live line where there is one, the same figures in events."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from xarch_kd.run.folder import RunFolder
from xarch_kd.run.progress import StageProgress, StepFigures, shown_parts
from xarch_kd.run.report import Reporter, clock


def _figures(step: int) -> StepFigures:
    return StepFigures(
        step=step, loss=3.0, parts={"a.0": 1.0, "a.1": 2.0}, tokens=64, learning_rate=0.1, gradient_norm=0.5
    )


def _run(folder: Path, console: Console, steps: int) -> None:
    with StageProgress(RunFolder(folder), Reporter(console), stage="mixers", steps=steps, first_step=0) as progress:
        for step in range(1, steps + 1):
            progress.step(_figures(step))


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    text = io.StringIO()
    _run(tmp_path, Console(file=text, width=200), 40)
    lines = text.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("mixers  step 1/40  ")
    assert lines[-1].startswith("mixers  step 40/40  ")
    assert "tokens/s  ETA 0:00  loss 3.0000  a 3.0000" in lines[-1]


def test_one_live_line_on_a_terminal(tmp_path: Path) -> None:
    text = io.StringIO()
    _run(tmp_path, Console(file=text, width=200, force_terminal=True), 40)
    final = text.getvalue().split("\r")[-1]
    assert "40/40" in final
    assert "loss 3.0000" in final
    assert "step 1/40" not in text.getvalue()


def test_events_hold_every_step(tmp_path: Path) -> None:
    _run(tmp_path, Console(file=io.StringIO()), 5)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5]
    last = events[-1]
    assert last["event"] == "step"
    assert last["stage"] == "mixers"
    assert last["loss"] == 3.0
    assert last["parts"] == {"a.0": 1.0, "a.1": 2.0}
    assert last["tokens_per_second"] > 0
    assert last["eta_seconds"] == 0


def test_parts_of_one_objective_are_summed_and_seconds_read_as_a_clock() -> None:
    assert shown_parts({"a.0": 0.25, "a.1": 0.5, "tokens": 1.0}) == "a 0.7500  tokens 1.0000"
    assert clock(61.4) == "1:01"
    assert clock(3723) == "1:02:03"
