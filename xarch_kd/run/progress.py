"""Progress: one live line a stage on a terminal, plain lines elsewhere, and the same figures in `events.jsonl`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from xarch_kd.run.folder import RunFolder

PLAIN_LINES_A_STAGE = 10


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """The figures of one optimiser step. `parts` are the weighted terms of `loss`, by objective name."""

    step: int
    loss: float
    parts: Mapping[str, float]
    tokens: int
    learning_rate: float
    gradient_norm: float | None


class StageProgress:
    """Shows and records the steps of one stage."""

    def __init__(self, folder: RunFolder, console: Console, *, stage: str, steps: int, first_step: int) -> None:
        self.folder = folder
        self.console = console
        self.stage = stage
        self.steps = steps
        self._first_step = first_step
        self._started = time.perf_counter()
        self._tokens = 0
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> StageProgress:
        if self.console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self._live.start()
            self._task = self._live.add_task(
                self.stage, total=self.steps, completed=self._first_step, figures="starting"
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, figures: StepFigures) -> None:
        """Record one step and show it."""
        elapsed = time.perf_counter() - self._started
        self._tokens += figures.tokens
        rate = self._tokens / elapsed if elapsed > 0 else 0.0
        eta = elapsed / (figures.step - self._first_step) * (self.steps - figures.step)
        self.folder.event(
            "step",
            stage=self.stage,
            step=figures.step,
            steps=self.steps,
            loss=figures.loss,
            parts=dict(figures.parts),
            tokens_per_second=round(rate, 1),
            eta_seconds=round(eta, 1),
            learning_rate=figures.learning_rate,
            gradient_norm=figures.gradient_norm,
        )
        text = f"{rate:,.0f} tokens/s  ETA {clock(eta)}  loss {figures.loss:.4f}  {shown_parts(figures.parts)}"
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=figures.step, figures=text)
        elif (
            figures.step in (self._first_step + 1, self.steps)
            or figures.step % max(1, self.steps // PLAIN_LINES_A_STAGE) == 0
        ):
            self.console.print(
                f"{self.stage}  step {figures.step}/{self.steps}  {text}", soft_wrap=True, highlight=False
            )

    def balanced(self, balance: Mapping[str, Any]) -> None:
        """Record and show the scales that make the gradients of balanced objectives as large as the anchor's."""
        self.folder.event("balanced", stage=self.stage, **balance)
        scales = ", ".join(f"{name} × {scale:.4g}" for name, scale in balance["scales"].items())
        self.console.print(
            f"{self.stage}  weights balanced against {balance['anchor']}: {scales}", soft_wrap=True, highlight=False
        )


def shown_parts(parts: Mapping[str, float]) -> str:
    """Return the parts as text, those of one objective (`name.layer`) summed so that the line stays one line."""
    sums: dict[str, float] = {}
    for name, value in parts.items():
        objective = name.split(".")[0]
        sums[objective] = sums.get(objective, 0.0) + value
    return "  ".join(f"{name} {value:.4f}" for name, value in sums.items())


def clock(seconds: float) -> str:
    """Return seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
