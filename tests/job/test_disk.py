"""Disk space: the forecast is what a run writes, and a run that does not fit is refused before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.cli.app import main
from xarch_kd.errors import Interrupted, UsageError
from xarch_kd.job.train import train
from xarch_kd.planning.disk import CHECKPOINT_BYTES
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import signal_after

ALL: dict[str, Any] = {**LOGIT_STAGE, "train": ["all"]}


def bytes_of(folder: Path, *patterns: str) -> int:
    return sum(path.stat().st_size for pattern in patterns for path in folder.rglob(pattern))


def test_the_forecast_is_what_a_run_writes(write_mapping: Write, tmp_path: Path) -> None:
    mapping, run = write_mapping(MIXER_STAGE, ALL), tmp_path / "run"
    plan = make_plan(mapping)
    with signal_after(MIXER_STAGE["steps"] + 1), pytest.raises(Interrupted):
        train(mapping, run)
    newest = sorted((run / "stages" / "02-logits").glob("checkpoint-*"))[-1]
    checkpoint = bytes_of(newest, "trained.safetensors", "optimizer.safetensors")
    assert checkpoint == pytest.approx(CHECKPOINT_BYTES * plan.stages[1].trainable_parameters, rel=0.1)
    before = bytes_of(run / "stages" / "01-mixers", "*")
    assert plan.disk.peak == pytest.approx(before + 3 * checkpoint, rel=0.1)
    train(mapping, run, resume=True)
    assert bytes_of(run, "*.safetensors") == pytest.approx(plan.disk.kept, rel=0.1)


def test_a_run_that_does_not_fit_is_refused_with_numbers(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = write_mapping({**MIXER_STAGE, "cache": "disk"})
    peak = make_plan(mapping).disk.peak
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("xarch_kd.planning.disk.shutil.disk_usage", lambda path: usage._replace(free=peak - 1))
    with pytest.raises(UsageError, match="the disk is too full for this run") as refused:
        train(mapping, tmp_path / "run")
    for part in ("GiB free", "at least 0.00 GiB", "set cache: memory or off in mixers"):
        assert part in str(refused.value)
    assert not (tmp_path / "run").exists()
    assert main(["plan", str(mapping)]) == 0
    assert "Disk: up to " in capsys.readouterr().out
