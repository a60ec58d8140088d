"""A stage that matches mixing matrices, run as a job: caches, resuming, what it learns."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.errors import Interrupted
from xarch_kd.job.train import train
from xarch_kd.run.progress import StageProgress, StepFigures
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import events_of, same, student_of

STEPS = 5
MIXING: dict[str, Any] = {
    "name": "mixing",
    "steps": STEPS,
    "batches": 2,
    "train": ["mixers"],
    "inputs": "teacher",
    "align": [{"name": "map", "tap": "mixing", "layers": "replaced"}],
    "optimizer": {"lr": 1e-2},
}
BOTH = {
    **MIXING,
    "align": [*MIXING["align"], {"name": "out", "tap": "mixer_output", "layers": "replaced"}],
}
SKETCH = {
    **MIXING,
    "align": [
        {
            **MIXING["align"][0],
            "loss": {"kind": "mixing", "distance": "frobenius", "impl": "sketch", "probes": 4},
        }
    ],
}


def parts(run: Path) -> list[dict[str, float]]:
    return [event["parts"] for event in events_of(run) if event["event"] == "step"]


def test_the_three_stages_of_mohawk(write_mapping: Write, tmp_path: Path) -> None:
    train(write_mapping({**MIXING, "steps": 12}, MIXER_STAGE, LOGIT_STAGE), tmp_path / "run")
    steps = parts(tmp_path / "run")
    assert set(steps[0]) == {"map.1", "map.2"}
    assert sum(steps[11].values()) < 0.9 * sum(steps[0].values())
    assert len(steps) == 12 + MIXER_STAGE["steps"] + LOGIT_STAGE["steps"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_changes_nothing(write_mapping: Write, tmp_path: Path, dtype: str) -> None:
    teacher = write_mapping(MIXING).read_text().split("model: ")[1].split("\n")[0]
    changes = {"teacher": {"model": teacher, "dtype": dtype}}
    for cache in ("off", "memory", "disk"):
        train(write_mapping({**BOTH, "cache": cache}, **changes), tmp_path / cache)
        assert parts(tmp_path / cache) == parts(tmp_path / "off")
        assert same(student_of(tmp_path / cache), student_of(tmp_path / "off"))


@pytest.mark.parametrize(("stage", "cache"), [(MIXING, "disk"), (MIXING, "memory"), (SKETCH, "off")])
def test_resuming_gives_bitwise_the_same_student(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: dict[str, Any], cache: str
) -> None:
    mapping = write_mapping({**stage, "cache": cache})
    train(mapping, tmp_path / "whole")
    step = StageProgress.step

    def stopping(self: StageProgress, figures: StepFigures) -> None:
        step(self, figures)
        if figures.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StageProgress, "step", stopping)
        with pytest.raises(Interrupted):
            train(mapping, tmp_path / "stopped")
    train(mapping, tmp_path / "stopped", resume=True)
    assert same(student_of(tmp_path / "stopped"), student_of(tmp_path / "whole"))
    assert parts(tmp_path / "stopped") == parts(tmp_path / "whole")
