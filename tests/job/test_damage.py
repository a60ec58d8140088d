"""Damaged files of a run: each is named, and the checkpoint before a damaged one is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from xarch_kd.errors import CheckpointError, Interrupted
from xarch_kd.files import damage_of
from xarch_kd.job.train import train
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import events_of, flip_bit, same, signal_after, student_of

STAGE: dict[str, Any] = {**MIXER_STAGE, "steps": 6, "checkpoint_every": 2}
Started = Callable[[], tuple[Path, Path, Mapping[str, Tensor]]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by the first test: a run that was stopped at its fifth step, and an uninterrupted one."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def started(kept: Path, write_mapping: Write, tmp_path: Path) -> Started:
    """Return mapping file, a copy of a run that stopped with checkpoint-4 and -5, and the student it should give."""

    def start() -> tuple[Path, Path, Mapping[str, Tensor]]:
        mapping = write_mapping(STAGE)
        if not (kept / "whole").exists():
            with signal_after(4), pytest.raises(Interrupted):
                train(mapping, kept / "stopped")
            train(mapping, kept / "whole")
        run = Path(shutil.copytree(kept / "stopped", tmp_path / "run"))
        assert sorted(path.name for path in (run / "stages" / "01-mixers").iterdir()) == [
            "checkpoint-4",
            "checkpoint-5",
        ]
        return mapping, run, student_of(kept / "whole")

    return start


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "trained.safetensors": (flip_bit, "damaged"),
    "optimizer.safetensors": (cut, "damaged"),
    "scheduler.safetensors": (Path.unlink, "missing"),
    "random.safetensors": (Path.unlink, "missing"),
    "source.json": (flip_bit, "damaged"),
    "trainer_state.json": (Path.unlink, "missing"),
    "checksums.json": (cut, "damaged"),
}


@pytest.mark.parametrize("name", ["trained.safetensors", "scheduler.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    started: Started, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    mapping, run, expected = started()
    damage, wrong = DAMAGES[name]
    damage(run / "stages" / "01-mixers" / "checkpoint-5" / name)
    capsys.readouterr()
    train(mapping, run, resume=True)
    assert f"checkpoint-5: {name} is {wrong}; resuming from checkpoint-4 instead" in capsys.readouterr().out
    assert same(student_of(run), expected)
    resumed = [event for event in events_of(run) if event["event"] in ("damaged-checkpoint", "resumed")]
    assert [event.get("checkpoint", event.get("step")) for event in resumed] == ["checkpoint-5", 4]


@pytest.mark.parametrize("name", list(DAMAGES))
def test_every_file_of_a_checkpoint_is_checked(started: Started, name: str) -> None:
    mapping, run, _ = started()
    stage = run / "stages" / "01-mixers"
    damage, wrong = DAMAGES[name]
    for checkpoint in stage.iterdir():
        assert damage_of(checkpoint) is None
        damage(checkpoint / name)
        assert damage_of(checkpoint) == f"{name} is {wrong}"
    with pytest.raises(CheckpointError, match="no checkpoint of stage 'mixers' is whole") as refused:
        train(mapping, run, resume=True)
    assert f"checkpoint-5: {name} is {wrong}, checkpoint-4: {name} is {wrong}" in str(refused.value)
    assert f"delete {stage}" in str(refused.value)
    assert sorted(path.name for path in stage.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_trained_tensors_of_a_finished_stage_are_checked(write_mapping: Write, tmp_path: Path) -> None:
    mapping, run = write_mapping(MIXER_STAGE, LOGIT_STAGE), tmp_path / "run"
    with signal_after(MIXER_STAGE["steps"] + 1), pytest.raises(Interrupted):
        train(mapping, run)
    flip_bit(run / "stages" / "01-mixers" / "trained.safetensors")
    with pytest.raises(CheckpointError, match=r"trained\.safetensors is damaged[\s\S]*or delete .*01-mixers"):
        train(mapping, run, resume=True)


def test_a_finished_stage_keeps_what_resuming_needs_and_no_optimizer(write_mapping: Write, tmp_path: Path) -> None:
    train(write_mapping({**MIXER_STAGE, "checkpoint_every": 1}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "stages" / "01-mixers").iterdir()] == ["trained.safetensors"]
