"""`xarch-kd watch` on running, finished and damaged runs."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from xarch_kd.cli import watch
from xarch_kd.cli.app import main


def write_run(folder: Path, *, finished: bool = False, steps: int = 3) -> Path:
    """Write the events of a run of two stages, the second of which is training."""
    folder.mkdir()
    lines: list[dict[str, Any]] = []
    for stage in ("mixers", "logits"):
        for step in range(1, steps + 1):
            figures = {"loss": 4.0 / step, "parts": {"output.1": 1.0 / step, "output.2": 3.0 / step}}
            lines.append({"event": "step", "stage": stage, "step": step, "steps": 5, "eta_seconds": 61.0, **figures})
        lines.append({"event": "evaluation", "stage": stage, "step": steps, "loss": 2.0, "nll": 5.25, "parts": {}})
    text = "".join(json.dumps({"time": time.time(), **line}) + "\n" for line in lines)
    (folder / "events.jsonl").write_text(text + '{"event": "st')
    if finished:
        (folder / "manifest.json").write_text("{}")
    return folder


def test_one_frame_has_every_stage_and_the_curves_of_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    assert main(["watch", str(run), "--once"]) == 0
    shown = capsys.readouterr().out
    assert f"{run}: running" in shown.replace("\n", "")
    for words in ("mixers", "3/5", "logits  step 3/5  loss 1.3333  held-out loss 2.0000, NLL 5.2500", "ETA 1:01"):
        assert words in shown
    assert "output" in shown and "4 to 1.333" in shown and "│" in shown
    assert "\x1b" not in shown


def test_another_stage_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", finished=True)
    assert main(["watch", str(run), "--stage", "mixers"]) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown and "mixers  step 3/5" in shown
    assert main(["watch", str(run), "--stage", "mixer"]) == 2
    assert "allowed: mixers, logits" in capsys.readouterr().err


def test_a_live_picture_follows_the_run_until_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    output = io.StringIO()
    terminal = Console(file=output, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(watch, "make_console", lambda: terminal)

    def train() -> None:
        while "step 3/5" not in output.getvalue():
            time.sleep(0.01)
        with (run / "events.jsonl").open("a") as file:
            step = {"event": "step", "stage": "logits", "step": 4, "steps": 5, "loss": 0.125, "parts": {}}
            file.write('art"}\n' + json.dumps(step) + "\n")
        while "step 4/5" not in output.getvalue():
            time.sleep(0.01)
        (run / "manifest.json").write_text("{}")

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    watch.command(run, every=0.05)
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert "loss 0.1250" in output.getvalue()
    assert output.getvalue().rstrip().endswith("\x1b[?25h")


def test_ctrl_c_ends_the_picture_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    output = io.StringIO()
    monkeypatch.setattr(watch, "make_console", lambda: Console(file=output, force_terminal=True, width=100))

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    watch.command(run)
    # The cursor is shown again.
    assert output.getvalue().rstrip().endswith("\x1b[?25h")


def test_a_run_that_has_not_begun_and_folders_that_hold_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.lock").touch()
    assert main(["watch", str(tmp_path / "begun"), "--once"]) == 0
    assert "no step was taken yet" in capsys.readouterr().out
    assert main(["watch", str(tmp_path), "--once"]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "nothing")]) == 2
    assert "There is no run folder" in capsys.readouterr().err
