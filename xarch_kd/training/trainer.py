"""One stage as a `transformers.Trainer` run: token-weighted sums, checks before the step, atomic checkpoints."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xarch_kd.data.rows import StageRows, collate
from xarch_kd.errors import CheckpointError, NonFiniteLoss
from xarch_kd.files import cannot_write, write_tensors
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.planning.plan import StagePlan
from xarch_kd.run.progress import StageProgress, StepFigures
from xarch_kd.run.signals import StopSignals
from xarch_kd.teacher.feature_cache import Features
from xarch_kd.teacher.reader import TeacherFeatures
from xarch_kd.training.aligner import Aligner, AlignerOutput
from xarch_kd.training.loss_balancing import write_balance
from xarch_kd.training.optimizer import parameter_groups

STATE_FILE = "trained.safetensors"
KEPT_CHECKPOINTS = 2
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class StageTrainer(Trainer):
    """Trains what the stage's plan names, in `folder`, showing its steps through `progress`."""

    def __init__(
        self,
        aligner: Aligner,
        reader: TeacherFeatures,
        rows: StageRows,
        plan: StagePlan,
        *,
        folder: Path,
        seed: int,
        cpu: bool,
        tracking: tuple[str, ...],
        signals: StopSignals,
    ) -> None:
        self.aligner = aligner
        self.reader = reader
        self.plan = plan
        self.rows = rows
        self.progress: StageProgress | None = None
        self._counts = LossNormalizers()
        self._figures: dict[str, Tensor] = {}
        super().__init__(
            model=aligner,
            args=_arguments(plan, folder=folder, seed=seed, cpu=cpu, tracking=tracking),
            train_dataset=rows,
            data_collator=collate,
        )
        # `compute_loss` divides sums by the whole step's counts, so the Trainer must not divide again.
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        self.add_callback(_Guard(self, signals))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over student matrices, student vectors (no weight decay), projectors and maps (own rate and decay)."""
        if self.optimizer is None:
            settings = self.plan.stage.optimizer
            projector_lr = settings.lr if settings.projector_lr is None else settings.projector_lr
            projector_decay = settings.projector_weight_decay
            projector_decay = settings.weight_decay if projector_decay is None else projector_decay
            groups = [
                *parameter_groups(self.aligner.student, settings, self.plan.mixers),
                {"params": self.aligner.auxiliary_parameters(), "weight_decay": projector_decay, "lr": projector_lr},
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas, eps=1e-8
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        """The rows come in the order of training already."""
        return SequentialSampler(self.rows)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Draw the micro-batches of one step and count what its sums are divided by, over all of them and all ranks."""
        batches = [batch for batch in (next(epoch_iterator, None) for _ in range(num_batches)) if batch is not None]
        ahead = self.aligner.needs_full_step_features and len(batches) > 1
        normalizers = LossNormalizers()
        for batch in batches:
            number = int(batch.pop("batch"))
            input_ids = batch["input_ids"].to(device)
            batch["features"] = self._read(input_ids, number) if ahead or len(batches) == 1 else None
            batch["number"] = number
            normalizers = normalizers + self.aligner.normalizers(
                input_ids, None, None, batch["features"], step=self._step
            )
        if self.accelerator.num_processes > 1:
            normalizers = normalizers.map(self._summed_over_ranks)
        self._counts = normalizers
        self._figures = {}
        return batches, None

    @property
    def _step(self) -> int:
        """Optimiser steps that are done."""
        return int(self.state.global_step)

    def _read(self, input_ids: Tensor, batch: int) -> Features:
        return self.reader.read(input_ids, batch=batch, sites=self.aligner.sites(self._step))

    def _summed_over_ranks(self, count: Tensor) -> Tensor:
        total = self.accelerator.reduce(count, reduction="sum")
        assert isinstance(total, Tensor)
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the micro-batch's share of the step's loss. Raises NonFiniteLoss before any gradient is taken."""
        number, features = inputs["number"], inputs["features"]
        if features is None:
            features = self._read(inputs["input_ids"], number)
        waiting = self._is_balancing()
        try:
            output: AlignerOutput = model(
                input_ids=inputs["input_ids"], features=features, normalizers=self._counts, step=self._step
            )
        except NonFiniteLoss as error:
            raise NonFiniteLoss(
                f"the loss of stage '{self.plan.stage.name}' is not finite at step {self.state.global_step + 1}",
                asked=f"{error.asked} on batch {number}",
                found=error.found or error.message,
                fix=self._where_to_go_on(),
            ) from error
        if waiting and not self._is_balancing() and self.progress is not None and self.aligner.balance is not None:
            self.progress.balanced(self.aligner.balance.state())
        for name, part in output.parts.items():
            self._figures[name] = self._figures.get(name, part.new_zeros(())) + part
        # Data-parallel gradients are averaged over ranks; the sums here are already divided by the global counts.
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _is_balancing(self) -> bool:
        return self.aligner.balance is not None and not self.aligner.balance.done

    def _where_to_go_on(self) -> str:
        kept = latest_checkpoint(Path(str(self.args.output_dir)))
        state = f"the last good checkpoint is {kept.name}" if kept else "no step of this stage was saved yet"
        return f"{state}; lower the stage's optimizer.lr or look at that batch's text. No optimiser step was taken."

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss parts to what the Trainer logs, and show the step."""
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        parts = {name: float(part) for name, part in self._figures.items()}
        loss = sum(parts.values())
        gradient_norm = logs.get("grad_norm")
        if self.progress is not None:
            self.progress.step(
                StepFigures(
                    step=self.state.global_step,
                    loss=loss,
                    parts=parts,
                    tokens=self.plan.tokens_per_step,
                    learning_rate=float(logs.get("learning_rate", math.nan)),
                    gradient_norm=None if gradient_norm is None else float(gradient_norm),
                )
            )
        named = {f"{self.plan.stage.name}/{name}": value for name, value in parts.items()}
        super().log({**logs, "loss": loss, **named}, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save only what this stage trains: the rest comes back from the student's source and earlier stages."""
        write_state(self.aligner, Path(output_dir or str(self.args.output_dir)) / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.aligner.load_trained_state(Path(resume_from_checkpoint) / STATE_FILE)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging())

    def _staging(self) -> Path:
        return Path(str(self.args.output_dir)) / "saving"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its final name and move it there when it is whole."""
        folder = Path(str(self.args.output_dir))
        final = folder / f"checkpoint-{self.state.global_step}"
        if final.exists():
            return
        staging = self._staging()
        shutil.rmtree(staging, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)
            os.replace(staging / final.name, final)
        except (OSError, RuntimeError) as error:
            # torch.save reports a full disk as a RuntimeError of its zip writer.
            raise cannot_write(final, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        for old in checkpoints(folder)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)


def write_state(aligner: Aligner, path: Path) -> None:
    """Write what a stage trained, whole or not at all. Raises CheckpointError if it can't."""
    if aligner.balance is not None:
        write_balance(aligner.balance, path)
    write_tensors(path, aligner.trained_state())


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a stage, oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in folder.glob("checkpoint-*")
        if (match := CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a stage, if there is one.

    Raises CheckpointError when it lacks a part, which only somebody else's hand can bring about.
    """
    found = checkpoints(folder)
    if not found:
        return None
    for name in (STATE_FILE, "trainer_state.json", "optimizer.pt"):
        if not (found[-1] / name).is_file():
            raise CheckpointError(
                f"the checkpoint {found[-1]} lacks {name}", fix=f"delete {found[-1]} and resume from the one before"
            )
    return found[-1]


class _Guard(TrainerCallback):
    """Looks before each optimiser step for gradients that are not finite, and after it for a request to stop."""

    def __init__(self, trainer: StageTrainer, signals: StopSignals) -> None:
        self.trainer = trainer
        self.signals = signals

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, parameter in self.trainer.aligner.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                stage = self.trainer.plan.stage.name
                raise NonFiniteLoss(
                    f"a gradient of stage '{stage}' is not finite at step {state.global_step + 1}",
                    found=f"parameter {name}",
                    fix=self.trainer._where_to_go_on(),
                )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.signals.requested is not None:
            control.should_save = True
            control.should_training_stop = True


def _arguments(plan: StagePlan, *, folder: Path, seed: int, cpu: bool, tracking: tuple[str, ...]) -> TrainingArguments:
    settings = plan.stage.optimizer
    return TrainingArguments(
        output_dir=str(folder),
        run_name=f"{folder.parent.parent.name}-{plan.stage.name}",
        max_steps=plan.stage.steps,
        per_device_train_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.stage.gradient_accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * plan.stage.steps),
        max_grad_norm=settings.max_grad_norm,
        logging_steps=1,
        save_steps=plan.stage.checkpoint_every or max(1, math.ceil(plan.stage.steps / 4)),
        seed=seed,
        use_cpu=cpu,
        report_to=list(tracking) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
    )
