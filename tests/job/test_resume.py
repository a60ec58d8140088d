"""Stopping and going on: after any step, with caches, after Ctrl-C and kill, to bitwise the same student."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.cli.app import main
from xarch_kd.errors import Interrupted
from xarch_kd.job.train import train
from xarch_kd.testing.launch import forked
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import events_of, same, signal_after, student_of

ALL_STEPS = MIXER_STAGE["steps"] + LOGIT_STAGE["steps"]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    """Filled by the first test of `test_resuming…` with the student of a run that was not stopped."""
    return {}


@pytest.mark.parametrize("count", range(1, ALL_STEPS + 1))
def test_resuming_after_any_step_gives_bitwise_the_same_student(
    write_mapping: Write, tmp_path: Path, uninterrupted: dict[str, Any], count: int
) -> None:
    mapping = write_mapping()
    if not uninterrupted:
        train(mapping, tmp_path / "whole")
        uninterrupted["student"] = student_of(tmp_path / "whole")
    with signal_after(count), pytest.raises(Interrupted):
        train(mapping, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    train(mapping, tmp_path / "stopped", resume=True)
    assert same(student_of(tmp_path / "stopped"), uninterrupted["student"])
    steps = [(event["stage"], event["step"]) for event in events_of(tmp_path / "stopped") if event["event"] == "step"]
    assert len(steps) == len(set(steps)) == ALL_STEPS


def test_ctrl_c_exits_130_with_the_command_to_resume(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping, run = write_mapping(), tmp_path / "run"
    with signal_after(2, signal.SIGINT):
        assert main(["train", str(mapping), "--output", str(run)]) == 130
    command = f"xarch-kd train {mapping} --output {run} --resume"
    assert command in capsys.readouterr().err
    assert (run / "stages" / "01-mixers" / "checkpoint-2").is_dir()
    assert main(["train", str(mapping), "--output", str(run)]) == 2
    assert f"resume it: {command}" in capsys.readouterr().err
    assert main(command.split()[1:]) == 0


def test_two_signals_at_once_save_the_step_and_the_message_is_true(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping, run = write_mapping({**MIXER_STAGE, "steps": 60}, LOGIT_STAGE), tmp_path / "run"
    command = ["train", str(mapping), "--output", str(run)]
    with signal_after(3, signal.SIGINT, signal.SIGTERM):
        assert main(command) == 130
    message = "stopped by SIGINT; the run resumes after step 4 of 60 of stage 'mixers'. Resume with:"
    assert message in capsys.readouterr().err
    assert [path.name for path in (run / "stages" / "01-mixers").iterdir()] == ["checkpoint-4"]
    with signal_after(1):
        assert main([*command, "--resume"]) == 130
    resumed = [event["step"] for event in events_of(run) if event["event"] in ("resumed", "step")]
    assert resumed == [1, 2, 3, 4, 4, 5, 6]


def test_a_signal_before_the_first_step_is_no_loss_that_is_hidden(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = write_mapping()
    monkeypatch.setattr(
        "xarch_kd.job.train.load_models", lambda *given, **options: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(Interrupted, match="resumes at step 1 of stage 'mixers', of which no step is saved"):
        train(mapping, tmp_path / "run")


def test_a_killed_process_loses_nothing_before_its_last_checkpoint(write_mapping: Write, tmp_path: Path) -> None:
    stage = {**MIXER_STAGE, "steps": 30, "checkpoint_every": 5}
    mapping, run = write_mapping(stage), tmp_path / "run"
    process = forked(train, mapping, run)
    checkpoints = run / "stages" / "01-mixers"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert list(checkpoints.glob("checkpoint-*")), "the process ended before it was killed"
    train(mapping, run, resume=True)
    train(mapping, tmp_path / "whole")
    assert same(student_of(run), student_of(tmp_path / "whole"))


@pytest.mark.parametrize(("stage", "cache"), [(MIXER_STAGE, "memory"), (MIXER_STAGE, "disk"), (LOGIT_STAGE, "disk")])
def test_resuming_with_a_cache_gives_bitwise_the_same_student(
    write_mapping: Write, tmp_path: Path, stage: dict[str, Any], cache: str
) -> None:
    mapping = write_mapping({**stage, "steps": 6, "batches": 3, "cache": cache})
    train(mapping, tmp_path / "whole")
    with signal_after(4), pytest.raises(Interrupted):
        train(mapping, tmp_path / "stopped")
    train(mapping, tmp_path / "stopped", resume=True)
    assert same(student_of(tmp_path / "stopped"), student_of(tmp_path / "whole"))


def test_a_finished_stage_is_not_run_again(write_mapping: Write, tmp_path: Path) -> None:
    mapping, run = write_mapping(), tmp_path / "run"
    with signal_after(MIXER_STAGE["steps"] + 1), pytest.raises(Interrupted):
        train(mapping, run)
    train(mapping, run, resume=True)
    finished = [event["stage"] for event in events_of(run) if event["event"] == "stage-finished"]
    assert finished == ["mixers", "logits"]
