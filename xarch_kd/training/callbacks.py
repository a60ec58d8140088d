"""Callbacks of a stage's trainer: checks before the optimizer steps, stopping after a signal, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xarch_kd.run.signals import StopSignals
from xarch_kd.training.ema import WeightAverage


class Guard(TrainerCallback):
    """Settles the checks of a step before the optimizer steps, and stops after a signal requested it."""

    def __init__(self, settle: Callable[[], None], signals: StopSignals, any_rank: Callable[[bool], bool]) -> None:
        self.settle = settle
        self.signals = signals
        self.any_rank = any_rank

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle the checks of the step."""
        self.settle()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint and the end of training if any process received a signal."""
        self.signals.agree(self.any_rank)
        if self.signals.requested is not None:
            control.should_save = True
            control.should_training_stop = True


class EvaluateEvery(TrainerCallback):
    """Requests an evaluation every `every` steps and after the last one."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request an evaluation if one is due."""
        control.should_evaluate = state.global_step % self.every == 0 or state.global_step == state.max_steps


class UpdateAverage(TrainerCallback):
    """Updates the average of the student's weights after each step."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the average."""
        self.average.update(int(state.global_step))
