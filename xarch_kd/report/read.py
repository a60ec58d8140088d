"""Everything that a run folder has recorded, read for a report: also of a run that is unfinished or was not evaluated.

Files are read as JSON data, without torch. What cannot be read of an unfinished run is a problem that the report shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.run.curves import CurveReader, StageCurves
from xarch_kd.run.folder import RunFolder

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Cost of one stage so far: steps taken, tokens, FLOPs by the plan's estimate, seconds and peak memory.

    `seconds` and `peak_bytes` are None until the stage is finished.
    """

    name: str
    step: int
    steps: int | None
    tokens: int
    flops: float
    seconds: float | None
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Contents of a run folder; empty for what it does not hold. `problems` are files that cannot be read."""

    folder: RunFolder
    plan: Json
    events: tuple[Json, ...]
    curves: Mapping[str, StageCurves]
    evaluation: Json
    selection: Json
    projectors: Json
    environment: Json
    mapping: str
    mixing: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    name: str = ""

    @property
    def is_finished(self) -> bool:
        """True once the run's manifest is written."""
        return self.folder.manifest.is_file()

    @property
    def results(self) -> Json:
        """Results of the evaluation by suite."""
        found = self.evaluation.get("results", {})
        return {name: value for name, value in found.items() if value} if isinstance(found, dict) else {}

    @cached_property
    def costs(self) -> tuple[StageCost, ...]:
        """Cost of each stage of the plan."""
        return tuple(self._cost(stage) for stage in self.plan.get("stages", ()))

    @property
    def tokens(self) -> int:
        """Training tokens of all steps."""
        return sum(cost.tokens for cost in self.costs)

    @property
    def flops(self) -> float:
        """Estimated FLOPs of all steps."""
        return sum(cost.flops for cost in self.costs)

    @property
    def seconds(self) -> float | None:
        """Wall time of all finished stages, None before the first."""
        known = [cost.seconds for cost in self.costs if cost.seconds is not None]
        return sum(known) if known else None

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of training, None before the first stage is finished."""
        return max((cost.peak_bytes for cost in self.costs if cost.peak_bytes is not None), default=None)

    def _cost(self, stage: Json) -> StageCost:
        name = stage["stage"]["name"]
        curves = self.curves.get(name)
        steps = stage["stage"].get("steps")
        step = curves.step if curves is not None else 0
        finished = [event for event in self.events if event.get("stage") == name and event["event"] == "stage-finished"]
        # An open stage's estimates are those of one step.
        planned = steps or 1
        return StageCost(
            name=name,
            step=step,
            steps=steps,
            tokens=step * int(stage["tokens_per_step"]),
            flops=float(stage["flops"]) * step / planned,
            seconds=finished[-1]["seconds"] if finished else None,
            peak_bytes=finished[-1]["peak_bytes"] if finished else None,
        )


@dataclass
class _Reading:
    """Files of one folder as they are read, and what is wrong with them."""

    folder: RunFolder
    problems: list[str] = field(default_factory=list)

    def json(self, path: Path) -> Json:
        """Return the object in a file, empty if there is none or it is damaged."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.problems.append(f"{path.name} cannot be read: {error}")
            return {}
        if isinstance(value, dict):
            return value
        self.problems.append(f"{path.name} cannot be read: it holds no object")
        return {}

    def text(self, path: Path) -> str:
        """Return the text of a file, empty if there is none."""
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def tensors(self, path: Path) -> Json:
        """Return the tensors of a file by name, empty if there is none or it is damaged."""
        if not path.is_file():
            return {}
        from xarch_kd.files import read_tensors

        try:
            return read_tensors(path)[0]
        except CheckpointError as error:
            self.problems.append(error.message)
            return {}

    def events(self) -> tuple[Json, ...]:
        """Return the events that are not steps; damaged lines are left out."""
        found = []
        for line in self.text(self.folder.events).splitlines():
            if '"event": "step"' in line:
                continue
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                found.append(event)
        return tuple(found)


def read_run(path: str | Path) -> RunRecord:
    """Return what a run folder holds.

    Raises UsageError for a folder without a run, CheckpointError for a file of a finished run that is not as it was
    written.
    """
    folder = RunFolder(Path(path))
    if not folder.plan.is_file():
        raise UsageError(
            "This is not a run folder: it holds no plan.json.",
            asked=folder.root,
            found=None if folder.root.exists() else "no such folder",
            fix="give the folder that `xarch-kd train --output` wrote",
        )
    files = (folder.plan, folder.events, folder.evaluation, folder.selection, folder.projector_reports, folder.mapping)
    folder.verify(*files, folder.mixing)
    reading = _Reading(folder)
    reader = CurveReader(folder.events)
    reader.update()
    if reader.skipped:
        reading.problems.append(f"{reader.skipped} damaged lines of {folder.events.name} are left out")
    evaluation = reading.json(folder.evaluation)
    if evaluation and not isinstance(evaluation.get("results"), dict):
        reading.problems.append(
            f"{folder.evaluation.name} has format {evaluation.get('format')}, which this version does not show; "
            "measure again: xarch-kd evaluate"
        )
        evaluation = {}
    return RunRecord(
        folder=folder,
        plan=reading.json(folder.plan),
        events=reading.events(),
        curves=reader.stages,
        evaluation=evaluation,
        selection=reading.json(folder.selection),
        projectors=reading.json(folder.projector_reports),
        environment=reading.json(folder.root / "environment.json"),
        mapping=reading.text(folder.mapping),
        mixing=reading.tensors(folder.mixing),
        problems=tuple(reading.problems),
        name=folder.root.resolve().name,
    )
