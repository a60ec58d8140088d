"""Run folders as a run leaves them, written without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.planning.render import plan_as_dict
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.folder import RunFolder
from xarch_kd.testing.examples import MAPPING, write_example_files
from xarch_kd.testing.reports import WriteRun


@pytest.fixture(scope="session")
def plan_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The data of plan.json of a tiny conversion."""
    folder = tmp_path_factory.mktemp("plan")
    write_example_files(folder)
    mapping = MAPPING.replace("model: teacher", f"model: {folder / 'teacher'}").replace(
        "text.txt", str(folder / "text.txt")
    )
    (folder / "mapping.yaml").write_text(mapping)
    return plan_as_dict(make_plan(folder / "mapping.yaml"))


@pytest.fixture
def write_run(tmp_path: Path, plan_data: dict[str, Any]) -> WriteRun:
    """Write a run folder: `results` of its evaluation (None: not evaluated), finished or not."""

    def write(name: str = "run", results: dict[str, Any] | None = None, *, finished: bool = True) -> Path:
        folder = RunFolder(tmp_path / name)
        folder.root.mkdir()
        folder.mapping.write_text(MAPPING)
        folder.plan.write_text(json.dumps({"fingerprint": "abc", **plan_data}))
        (folder.root / "environment.json").write_text(json.dumps({"torch": "2.13", "devices": []}))
        folder.event("started", seconds_to_load=1.0)
        for step, loss in ((1, 8.0), (2, 0.5)):
            parts = {"output.1": loss}
            folder.event("step", stage="mixers", step=step, steps=2, loss=loss, parts=parts, tokens_per_second=1.0)
        if finished:
            folder.event("stage-finished", stage="mixers", seconds=120.0, peak_bytes=3 << 20)
            folder.event("finished", seconds=150.0)
        if results is not None:
            stored = {"format": 2, "teacher": "t", "student": "s", "level": 0.95, "resamples": 2000, "seed": 0}
            folder.evaluation.write_text(json.dumps({**stored, "results": results}))
        if finished:
            folder.finish()
        return folder.root

    return write
