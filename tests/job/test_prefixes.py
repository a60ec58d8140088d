"""Stages whose prefixes are sampled: sources, resumption, two ranks, refusals and collapse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xarch_kd.cli.app import main
from xarch_kd.errors import Interrupted
from xarch_kd.job.train import train
from xarch_kd.testing.mapping import LOGIT_STAGE, Write
from xarch_kd.testing.runs import events_of, same, signal_after, student_of

MIXED: dict[str, Any] = {
    **LOGIT_STAGE,
    "steps": 6,
    "prefixes": {
        "data": 0.3,
        "student": {"share": 0.5, "temperature": 0.9, "top_k": 50},
        "teacher": {"share": 0.2, "top_p": 0.9},
        "prompt_tokens": 4,
        "replay": {"capacity": 4, "fresh": 0.5},
        "horizon": {"initial": 0.5},
    },
}


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [event for event in events_of(run) if event["event"] == "step"]


def test_a_mixture_is_resumed_from_its_buffer_bitwise(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = write_mapping(MIXED)
    assert main(["train", str(mapping), "--output", str(tmp_path / "whole")]) == 0
    assert "student " in (printed := capsys.readouterr().out) and "distinct-4" in printed
    whole = steps_of(tmp_path / "whole")
    drawn = [event["prefixes"]["batches"] for event in whole]
    for name, share in (("data", 0.3), ("student", 0.5), ("teacher", 0.2)):
        assert abs(sum(batches[name] for batches in drawn) - 6 * share) < 1
    assert sum(event["prefixes"]["replayed"] for event in whole) > 0
    with signal_after(4), pytest.raises(Interrupted):
        train(mapping, tmp_path / "stopped")
    train(mapping, tmp_path / "stopped", resume=True)
    assert same(student_of(tmp_path / "stopped"), student_of(tmp_path / "whole"))
    figures = [(event["loss"], event["prefixes"]["batches"]) for event in steps_of(tmp_path / "stopped")]
    assert figures == [(event["loss"], event["prefixes"]["batches"]) for event in whole]
