"""Loss curves of a run, read from `events.jsonl` while it grows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class StageCurves:
    """Figures of one stage by step: the loss, its parts by objective, and those on held-out text.

    `tokens_per_second`, `eta_seconds` and `learning_rate` are those of the last step. Figures that are not finite are
    left out.
    """

    name: str
    steps: int = 0
    loss: dict[int, float] = field(default_factory=dict)
    parts: dict[str, dict[int, float]] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    nll: dict[int, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    learning_rate: float | None = None
    is_finished: bool = False

    @property
    def step(self) -> int:
        """The last step."""
        return max(self.loss, default=0)

    def _add_step(self, event: Mapping[str, Any]) -> None:
        step = int(event["step"])
        self.steps = int(event["steps"])
        _put(self.loss, step, event["loss"])
        for name, value in event["parts"].items():
            _put(self.parts.setdefault(objective_of(str(name)), {}), step, value, added=True)
        for name in ("tokens_per_second", "eta_seconds", "learning_rate"):
            value = event.get(name)
            setattr(self, name, float(value) if isinstance(value, int | float) else None)

    def _forget_after(self, step: int) -> None:
        """Leave out steps that a resumed run takes again."""
        for curve in (self.loss, self.held_out, self.nll, *self.parts.values()):
            for later in [number for number in curve if number > step]:
                del curve[later]


def objective_of(part: str) -> str:
    """Return the objective of a part `name.layer`."""
    return part.split(".")[0]


def _put(curve: dict[int, float], step: int, value: Any, *, added: bool = False) -> None:
    number = float(value)
    if math.isfinite(number):
        curve[step] = curve.get(step, 0.0) + number if added else number


class CurveReader:
    """Curves of the stages of a run, in the order in which they began; `update` reads what was written since.

    A last line without its end is read when that was written. Lines that are no events are counted in `skipped`.

    >>> from pathlib import Path
    >>> from xarch_kd.run.curves import CurveReader
    >>> step = '{"event": "step", "stage": "mixers", "step": 1, "steps": 2, "loss": 0.5, "parts": {}}'
    >>> _ = Path("events.jsonl").write_text(step + "\\n" + step[:20])
    >>> reader = CurveReader(Path("events.jsonl"))
    >>> reader.update()
    >>> reader.stages["mixers"].loss
    {1: 0.5}
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, StageCurves] = {}
        self.skipped = 0
        self.last_time: float | None = None
        self._offset = 0

    def update(self) -> None:
        """Read the lines that were written since the last call; a file that became shorter is read again."""
        try:
            size = self.path.stat().st_size
            if size < self._offset:
                self.stages, self.skipped, self._offset = {}, 0, 0
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(size - self._offset)
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for line in data[:whole].splitlines():
            if line.strip():
                self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            kind = event["event"]
            if isinstance(event.get("time"), int | float):
                self.last_time = float(event["time"])
            if "stage" not in event:
                return
            name = "".join(letter if letter.isprintable() else "?" for letter in str(event["stage"]))
            stage = self.stages.setdefault(name, StageCurves(name))
            if kind == "step":
                stage._forget_after(int(event["step"]) - 1)
                stage._add_step(event)
            elif kind == "evaluation":
                _put(stage.held_out, int(event["step"]), event["loss"])
                _put(stage.nll, int(event["step"]), event["nll"])
            elif kind == "resumed":
                stage._forget_after(int(event["step"]))
            elif kind == "stage-finished":
                stage.is_finished = True
        except (ValueError, KeyError, TypeError, AttributeError):
            self.skipped += 1
