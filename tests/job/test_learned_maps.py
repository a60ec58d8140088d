"""A layer map that was learned is shown, and a collapsed one warned of."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from xarch_kd.job.train import train
from xarch_kd.layer_mapping.layer_map import LayerMap
from xarch_kd.testing.mapping import Write
from xarch_kd.testing.runs import events_of
from xarch_kd.training.aligner import Aligner

STAGE = {
    "name": "one",
    "steps": 1,
    "train": ["all"],
    "align": [{"name": "e", "tap": "hidden", "layers": "learned", "loss": {"kind": "cka"}}],
}


def run(write_mapping: Write, folder: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    train(write_mapping(STAGE), folder, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_map_is_shown_and_recorded(write_mapping: Write, tmp_path: Path) -> None:
    text = run(write_mapping, tmp_path / "run")
    assert "learned: student layers down, teacher layers across" in text
    assert "collapsed" not in text
    (event,) = [event for event in events_of(tmp_path / "run") if event["event"] == "layer-map"]
    assert event["warning"] is None
    assert [round(sum(row), 3) for row in event["weights"]] == [1.0] * 4


def test_a_collapsed_map_is_warned_of(write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collapsed = LayerMap("learned", torch.tensor([[0.0, 1.0, 0.0, 0.0]]).repeat(4, 1))
    monkeypatch.setattr(Aligner, "layer_maps", lambda self, step: {"e": collapsed})
    text = run(write_mapping, tmp_path / "run")
    assert "warning: stage one, e: the layer map collapsed: 4 student layers learn from 1.0 teacher layers" in text
    (event,) = [event for event in events_of(tmp_path / "run") if event["event"] == "layer-map"]
    assert "collapsed" in event["warning"]
