"""Failures during a run: losses, gradients, disks, texts; nothing is lost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.cli.app import main
from xarch_kd.errors import CheckpointError, NonFiniteLoss
from xarch_kd.files import cannot_write
from xarch_kd.job.train import train
from xarch_kd.objectives import features as objectives_module
from xarch_kd.testing.mapping import MIXER_STAGE, Write
from xarch_kd.testing.runs import same, student_of
from xarch_kd.training import checkpoints as checkpoints_module


def test_a_loss_that_is_not_finite_stops_before_the_step(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"count": 0}
    honest = objectives_module.feature_loss

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        calls["count"] += 1
        return honest(*args, **kwargs) * (float("nan") if calls["count"] > 2 * 2 else 1.0)

    monkeypatch.setattr(objectives_module, "feature_loss", poisoned)
    stage = {**MIXER_STAGE, "checkpoint_every": 1}
    with pytest.raises(NonFiniteLoss) as stopped:
        train(write_mapping(stage), tmp_path / "run")
    text = str(stopped.value)
    assert "the loss of stage 'mixers' is not finite at step 3" in text
    assert "objective mixer-output.1" in text
    assert "on batch 2" in text
    assert "the last good checkpoint is checkpoint-2" in text
    assert stopped.value.exit_code == 3
    assert (tmp_path / "run" / "stages" / "01-mixers" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * factor

    honest = objectives_module.feature_loss

    def poisoned(kind: str, student: Tensor, *given: Any, **more: Any) -> Tensor:
        loss = honest(kind, student, *given, **more)
        return Poison.apply(loss) if next(calls) == 1 else loss

    # The second of two blocks alone: a norm that is not a number must not spoil the gradients of the first.
    calls = itertools.count()
    monkeypatch.setattr(objectives_module, "feature_loss", poisoned)
    with pytest.raises(NonFiniteLoss) as stopped:
        train(write_mapping(MIXER_STAGE), tmp_path / "run")
    text = str(stopped.value)
    assert "a gradient of stage 'mixers' is not finite at step 1" in text
    assert "parameter student.model.layers.2." in text


def test_a_full_disk_leaves_the_previous_checkpoint_intact(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = write_mapping({**MIXER_STAGE, "checkpoint_every": 1})
    honest = checkpoints_module.write_tensors
    calls = {"count": 0}

    def filling(path: Path, tensors: Mapping[str, Tensor]) -> None:
        calls["count"] += 1
        if calls["count"] == 3:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".partial").write_bytes(b"half")
            raise cannot_write(path, OSError(28, "No space left on device"))
        honest(path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints_module, "write_tensors", filling)
        with pytest.raises(CheckpointError, match=r"no space left on the disk[\s\S]*with --resume"):
            train(mapping, tmp_path / "run")
    stage = tmp_path / "run" / "stages" / "01-mixers"
    assert sorted(path.name for path in stage.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    train(mapping, tmp_path / "run", resume=True)
    train(mapping, tmp_path / "whole")
    assert same(student_of(tmp_path / "run"), student_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"files": ["absent.txt"]}, "a file pattern matches nothing"),
        ({"files": ["{empty}"]}, "is empty"),
        ({"files": ["{text}"], "sequence_length": 65536}, "too short for one row"),
    ],
)
def test_bad_text_leaves_no_run_folder(
    write_mapping: Write,
    tmp_path: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    data: dict[str, Any],
    message: str,
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    files = [name.format(empty=empty, text=text_file) for name in data["files"]]
    mapping = write_mapping(data={**data, "files": files})
    assert main(["train", str(mapping), "--output", str(tmp_path / "run")]) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
