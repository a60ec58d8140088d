"""Progress of the steps of one stage: a live line or plain lines, and the same figures in `events.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xarch_kd.run.folder import RunFolder
from xarch_kd.run.report import Reporter, clock

PLAIN_LINES_PER_STAGE = 10


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Figures of one optimizer step, over all ranks. `parts` are the weighted terms of `loss`, by objective name.

    `prefixes` are figures of a stage whose prefixes are sampled, as JSON values, and `note` their text.
    """

    step: int
    loss: float
    parts: Mapping[str, float]
    tokens: int
    learning_rate: float
    gradient_norm: float | None
    prefixes: Mapping[str, Any] | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class HeldOutFigures:
    """Figures on held-out text after `step` steps of a stage, over all ranks.

    `parts` are the weighted terms of `loss`, by objective name; `nll` is the student's negative log-likelihood per
    token in nats, over `tokens` predicted tokens.
    """

    step: int
    loss: float
    parts: Mapping[str, float]
    nll: float
    tokens: int


class StageProgress:
    """Shows and records the steps of one stage."""

    def __init__(self, folder: RunFolder, reporter: Reporter, *, stage: str, steps: int, first_step: int) -> None:
        self.folder = folder
        self.reporter = reporter
        self.stage = stage
        self.steps = steps
        self._first_step = first_step
        self._started = reporter.clock()
        self._tokens = 0
        self._live: Progress | None = None

    def __enter__(self) -> StageProgress:
        if self.reporter.console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self.reporter.console,
            )
            self._live.start()
            self._live.add_task(self.stage, total=self.steps, completed=self._first_step, figures="starting")
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, figures: StepFigures) -> None:
        """Record one step and show it."""
        elapsed = self.reporter.clock() - self._started
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
            **({} if figures.prefixes is None else {"prefixes": dict(figures.prefixes)}),
        )
        speed = f"{rate:,.0f} tokens/s"
        losses = f"loss {figures.loss:.4f}  {shown_parts(figures.parts)}"
        if figures.note:
            losses += f"  {figures.note}"
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=figures.step, figures=f"{speed}  {losses}")
        elif (
            figures.step in (self._first_step + 1, self.steps)
            or figures.step % max(1, self.steps // PLAIN_LINES_PER_STAGE) == 0
        ):
            self.reporter.line(
                f"{self.stage}  step {figures.step}/{self.steps}  {speed}  ETA {clock(eta)}  {losses}",
            )

    def evaluation(self, figures: HeldOutFigures, *, is_best: bool) -> None:
        """Record and show figures on held-out text; `is_best` if the stage's metric was never lower."""
        self.folder.event(
            "evaluation",
            stage=self.stage,
            step=figures.step,
            loss=figures.loss,
            parts=dict(figures.parts),
            nll=figures.nll,
            tokens=figures.tokens,
            is_best=is_best,
        )
        best = "  (best so far)" if is_best else ""
        self.reporter.line(
            f"{self.stage}  step {figures.step}/{self.steps}  held-out loss {figures.loss:.4f}  "
            f"{shown_parts(figures.parts)}  NLL {figures.nll:.4f}{best}"
        )

    def warning(self, text: str) -> None:
        """Record and show a warning about the stage."""
        self.folder.event("warning", stage=self.stage, text=text)
        self.reporter.line(f"warning: stage {self.stage}: {text}")

    def balanced(self, balance: Mapping[str, Any]) -> None:
        """Record and show the scales that make the gradients of balanced objectives as large as the anchor's."""
        self.folder.event("balanced", stage=self.stage, **balance)
        scales = ", ".join(f"{name} × {scale:.4g}" for name, scale in balance["scales"].items())
        self.reporter.line(f"{self.stage}  weights balanced against {balance['anchor']}: {scales}")


def shown_parts(parts: Mapping[str, float]) -> str:
    """Return the parts as text, those of one objective (`name.layer`) summed so that the line stays one line."""
    sums: dict[str, float] = {}
    for name, value in parts.items():
        objective = name.split(".")[0]
        sums[objective] = sums.get(objective, 0.0) + value
    return "  ".join(f"{name} {value:.4f}" for name, value in sums.items())
