"""Runs on two processes: equal to one process, resumable, and refused or ended together when they cannot be equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.job.rank_cases import RATES
from tests.job.test_shipped import FAMILIES, FILES, shrunk, teachers
from xarch_kd.job.train import train
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.launch import launch
from xarch_kd.testing.runs import events_of, student_of

__all__ = ["teachers"]

STEPS = 20
CASES = str(Path(__file__).with_name("rank_cases.py"))


def on_two_ranks(folder: Path, runs: list[tuple[str, Path, bool, int | None]]) -> None:
    """Make runs on two processes of one launch; see `rank_cases.py`."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps([[mapping, str(output), *rest] for mapping, output, *rest in runs]))
    done = launch(2, CASES, str(listed), timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


def content(path: Path, teachers: dict[str, str], text: Path) -> dict[str, Any]:
    """Return a shipped file on a tiny teacher, 20 steps long, with an even number of rows in every micro-batch."""
    found = shrunk(path, teachers[FAMILIES[path.stem.split("--")[0]]], text)
    found["data"]["batch_size"] = 4
    for stage in found["stages"]:
        stage |= {"steps": STEPS}
        if "batch_size" in stage:
            stage["batch_size"] = 2
    return found


@pytest.fixture(scope="module")
def shipped(
    tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, str], text_file: Path
) -> dict[str, tuple[Path, Path]]:
    """The folders of each shipped file's run on one process and on two, by the file's name."""
    folder = tmp_path_factory.mktemp("ranks")
    runs, found = [], {}
    for path in FILES:
        mapping = folder / path.name
        mapping.write_text(yaml.safe_dump(content(path, teachers, text_file), sort_keys=False), encoding="utf-8")
        one, two = folder / f"{path.stem}-one", folder / f"{path.stem}-two"
        train(make_plan(mapping, rates=RATES), one)
        runs.append((str(mapping), two, False, None))
        found[path.stem] = (one, two)
    on_two_ranks(folder, runs)
    return found


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([event["loss"] for event in events_of(run) if event["event"] == "step"], dtype=torch.float64)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_two_processes_equal_one_on_every_shipped_file(shipped: dict[str, tuple[Path, Path]], name: str) -> None:
    one, two = shipped[name]
    assert [event["processes"] for event in events_of(two) if event["event"] == "started"] == [2]
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-6, atol=0)
    expected, found = student_of(one), student_of(two)
    assert expected.keys() == found.keys()
    for key, weights in expected.items():
        error = float((found[key].double() - weights.double()).norm() / weights.double().norm().clamp(min=1e-12))
        assert error < 1e-6, f"{key}: {error}"
