"""A run folder seen from Python: its paths and metrics, read from its files when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xarch_kd.display import AsIs, as_html, as_text, byte_text, duration
from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.evaluation.results import Evaluation, read_evaluation, render
from xarch_kd.evaluation.suite_result import SuiteResult
from xarch_kd.planning.layer_choice import LayerSelection
from xarch_kd.planning.render_selection import render_selection
from xarch_kd.run.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class StageMetrics:
    """Metrics of one stage of a run.

    `step` is the last optimizer step of `steps`; `loss` and its weighted `parts`, by objective and layer, are those of
    that step (None and empty before the first one). `seconds`, since the last resume, and `peak_bytes` are None until
    the stage is finished.

    `evaluations` are the figures on held-out text by step: `loss`, `nll` and the parts. `weights_of_step` is the step
    whose weights the stage ended with, None until then or without evaluations.
    """

    name: str
    step: int
    steps: int
    loss: float | None
    parts: Mapping[str, float]
    seconds: float | None
    peak_bytes: int | None
    evaluations: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    weights_of_step: int | None = None

    @property
    def held_out(self) -> Mapping[str, float]:
        """Figures on held-out text of the weights that the stage ended with, of the last evaluation until then."""
        last = max(self.evaluations, default=None)
        kept = self.weights_of_step if self.weights_of_step in self.evaluations else last
        return {} if kept is None else self.evaluations[kept]


class Run:
    """A run folder, finished or not: paths, losses of each stage, evaluation.

    `xarch_kd.train` returns one; `Run(path)` opens the folder of an earlier run. `was_finished` is true if `train`
    found the run finished and did nothing. Metrics are read from the folder on first use and then kept: open the folder
    again to follow a run that is still training.

    Raises UsageError if the folder does not hold a run, and CheckpointError, on use, for a file of a finished run that
    is not as it was written.

    >>> import xarch_kd as xkd
    >>> from rich.console import Console
    >>> from xarch_kd.testing.examples import write_example_files
    >>> write_example_files()  # teacher/, text.txt and mapping.yaml, all tiny
    >>> run = xkd.train("mapping.yaml", "runs/first", console=Console(quiet=True))
    >>> opened = xkd.Run("runs/first")
    >>> opened.stages["mixers"].step, "held-out/difference" in opened.metrics
    (2, True)
    """

    def __init__(self, path: str | Path, *, was_finished: bool = False) -> None:
        self.folder = RunFolder(Path(path))
        self.was_finished = was_finished
        if not self.folder.plan.is_file():
            raise UsageError(
                "This is not a run folder: it holds no plan.json.",
                asked=self.path,
                found="no such folder" if not self.path.exists() else None,
                fix="give the folder that xarch_kd.train, or `xarch-kd train --output`, wrote",
            )

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.root

    @property
    def is_finished(self) -> bool:
        """True once the student is saved and every file is listed in `manifest.json`."""
        return self.folder.manifest.is_file()

    @property
    def student(self) -> Path:
        """The folder of the stock student, for `AutoModelForCausalLM.from_pretrained`."""
        return self.folder.student

    @property
    def mapping(self) -> Path:
        """The mapping file as run."""
        return self.folder.mapping

    @cached_property
    def plan(self) -> Mapping[str, Any]:
        """The resolved plan as JSON data."""
        self.folder.verify(self.folder.plan)
        return _object(self.folder.plan.read_text(encoding="utf-8"), self.folder.plan)

    @cached_property
    def events(self) -> tuple[Mapping[str, Any], ...]:
        """The lines of `events.jsonl`: every step's losses, and what happened in between."""
        if not self.folder.events.is_file():
            return ()
        self.folder.verify(self.folder.events)
        lines = self.folder.events.read_text(encoding="utf-8").splitlines(keepends=True)
        # The last line of a run that is training, or was killed, may be cut short.
        whole = lines[:-1] if lines and not lines[-1].endswith("\n") else lines
        return tuple(_object(line, self.folder.events) for line in whole)

    @cached_property
    def stages(self) -> Mapping[str, StageMetrics]:
        """Metrics of each stage by name, in the order of the plan."""
        return {stage["stage"]["name"]: self._stage(stage["stage"]) for stage in self.plan["stages"]}

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """Likelihood of teacher and student on each text, None if it was not measured."""
        self.folder.verify(self.folder.evaluation)
        return read_evaluation(self.folder.evaluation) if self.folder.evaluation.is_file() else None

    @cached_property
    def selection(self) -> LayerSelection | None:
        """Measured choice of the layers that keep attention, None if they were not chosen by measurement."""
        self.folder.verify(self.folder.selection)
        if not self.folder.selection.is_file():
            return None
        path = self.folder.selection
        return LayerSelection.from_dict(_object(path.read_text(encoding="utf-8"), path))

    @property
    def seconds(self) -> float | None:
        """Wall time of all finished stages together, None before the first of them."""
        known = [stage.seconds for stage in self.stages.values() if stage.seconds is not None]
        return sum(known) if known else None

    @property
    def metrics(self) -> Mapping[str, float]:
        """Last losses and evaluation results by name, e.g. `mixers/loss`, `mixers/mixer-output.6`, `held-out/student`.

        Losses are those of each stage's last step; results are NLL per token in nats, and of other suites the numbers
        that compare the student with its teacher, e.g. `long_range/repeat copy`. Stages that are evaluated while they
        train add `mixers/held-out/loss`, `mixers/held-out/nll` and their parts
        (`StageMetrics.held_out`).
        """
        found: dict[str, float] = {}
        for name, stage in self.stages.items():
            if stage.loss is not None:
                found[f"{name}/loss"] = stage.loss
            found |= {f"{name}/{part}": value for part, value in stage.parts.items()}
            found |= {f"{name}/held-out/{part}": value for part, value in stage.held_out.items()}
        for result in self.evaluation.likelihood if self.evaluation is not None else ():
            found[f"{result.text}/teacher"] = result.teacher_nll
            found[f"{result.text}/student"] = result.student_nll
            found[f"{result.text}/difference"] = result.difference
        for name, result in (self.evaluation.results if self.evaluation is not None else {}).items():
            if isinstance(result, SuiteResult):
                found |= {f"{name}/{each.name}": each.value for each in result.figures if each.value is not None}
        return found

    def _stage(self, stage: Mapping[str, Any]) -> StageMetrics:
        own = [event for event in self.events if event.get("stage") == stage["name"]]
        last = next((event for event in reversed(own) if event["event"] == "step"), {})
        finished = [event for event in own if event["event"] == "stage-finished"]
        kept = [event["step"] for event in own if event["event"] == "weights-kept"]
        evaluations = {
            event["step"]: {"loss": event["loss"], "nll": event["nll"], **event["parts"]}
            for event in own
            if event["event"] == "evaluation"
        }
        return StageMetrics(
            name=stage["name"],
            step=last.get("step", 0),
            steps=stage["steps"],
            loss=last.get("loss"),
            parts=dict(last.get("parts", {})),
            seconds=finished[-1]["seconds"] if finished else None,
            peak_bytes=finished[-1]["peak_bytes"] if finished else None,
            evaluations=evaluations,
            weights_of_step=kept[-1] if kept else None,
        )

    def __repr__(self) -> str:
        return as_text(self, more="rich.print(run) shows everything")

    def __rich__(self) -> RenderableType:
        state = "finished" if self.is_finished else "unfinished"
        parts: list[RenderableType] = [Text(f"Run {self.path} ({state})")]
        if self.selection is not None:
            parts.append(render_selection(self.selection))
        parts.append(_stage_table(self.stages.values()))
        if self.evaluation is not None:
            parts.append(render(self.evaluation))
        if self.is_finished:
            parts.append(Text(f"student: {self.student}"))
        return AsIs(Group(*parts))

    def _repr_html_(self) -> str:
        return as_html(self)


def _stage_table(stages: Iterable[StageMetrics]) -> Table:
    rows = tuple(stages)
    columns = ["stage", "step", "loss", "parts", "time", "memory"]
    if any(stage.held_out for stage in rows):
        columns.insert(4, "held-out")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold", justify="left" if column in ("stage", "parts") else "right")
    for stage in rows:
        cells = _cells(stage)
        table.add_row(*(cells[column] for column in columns))
    return table


def _cells(stage: StageMetrics) -> dict[str, Text | str]:
    """Return the cells of a stage's row, by column."""
    shown = [f"{name} {value:.4g}" for name, value in list(stage.parts.items())[:4]]
    held_out = stage.held_out
    return {
        "stage": Text(stage.name),
        "step": f"{stage.step}/{stage.steps}",
        "loss": "" if stage.loss is None else f"{stage.loss:.4g}",
        "parts": Text(", ".join(shown) + (f", … ({len(stage.parts)})" if len(stage.parts) > 4 else "")),
        "held-out": f"{held_out['loss']:.4g}, NLL {held_out['nll']:.4g}" if held_out else "",
        "time": "" if stage.seconds is None else duration(stage.seconds),
        "memory": "" if stage.peak_bytes is None else byte_text(stage.peak_bytes),
    }


def _object(text: str, path: Path) -> Mapping[str, Any]:
    """Return the JSON object in `text`. Raises CheckpointError naming the file if it is damaged."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path.name} is damaged.", asked=path, found=error) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is damaged.", asked=path, found=type(value).__name__)
    return value
