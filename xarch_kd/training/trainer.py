"""One stage as a `transformers.Trainer` run: token-weighted sums, checks before the step, atomic checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from xarch_kd.data.batches import Batch, BatchSource
from xarch_kd.errors import NonFiniteLoss, XarchError
from xarch_kd.files import write_json
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.ops import checks
from xarch_kd.planning.plan import StagePlan
from xarch_kd.run.processes import Processes
from xarch_kd.run.progress import StageProgress, StepFigures
from xarch_kd.run.signals import StopSignals
from xarch_kd.taps.sites import Site
from xarch_kd.teacher.feature_cache import Features
from xarch_kd.teacher.reader import TeacherFeatures
from xarch_kd.training.aligner import Aligner, AlignerOutput
from xarch_kd.training.arguments import training_arguments
from xarch_kd.training.callbacks import EvaluateEvery, Guard, UpdateAverage
from xarch_kd.training.checkpoints import (
    SOURCE_FILE,
    STATE_FILE,
    checkpoints,
    read_source_state,
    staged_checkpoint,
    staging_of,
    step_of,
    write_state,
)
from xarch_kd.training.ema import WeightAverage
from xarch_kd.training.gradients import clip_gradients, gradient_norm, nonfinite_parameter
from xarch_kd.training.held_out import HeldOut, read_record
from xarch_kd.training.loss_balancing import observe_gradients
from xarch_kd.training.micro_batches import MicroBatchStream
from xarch_kd.training.optimizer import build_optimizer, set_mode
from xarch_kd.training.prefixes import PrefixMixture
from xarch_kd.training.stage_setup import cpu_chunks
from xarch_kd.training.state_trainer import StateTrainer


class StageTrainer(StateTrainer):
    """Trainer of one stage on the batches of `source`, in `folder`; steps are shown by `progress`.

    All checks of values of a step are settled by one read of the device, before the optimizer steps. Each of several
    processes takes its share of the rows of every micro-batch; sums are divided by what all ranks count, so gradients
    and logged losses are those of one process with all rows. Rank 0 writes the checkpoints.
    """

    def __init__(
        self,
        aligner: Aligner,
        reader: TeacherFeatures,
        source: BatchSource,
        plan: StagePlan,
        *,
        folder: Path,
        seed: int,
        cpu: bool,
        tracking: tuple[str, ...],
        signals: StopSignals,
        processes: Processes | None = None,
        held_out: Iterable[Batch] = (),
        prefixes: PrefixMixture | None = None,
    ) -> None:
        self.aligner = aligner
        self.prefixes = prefixes
        self.processes = processes or Processes()
        self.reader = reader
        self.plan = plan
        self.source = source
        self.progress: StageProgress | None = None
        self._normalizers = LossNormalizers()
        self._figures: dict[str, Tensor] = {}
        self._tokens = 0
        self._checks = checks.DeferredChecks()
        super().__init__(
            model=aligner,
            args=training_arguments(plan, self.processes, folder=folder, seed=seed, cpu=cpu, tracking=tracking),
        )
        # `compute_loss` divides sums by the normalizers of the whole step, so the Trainer must not divide again.
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        self.add_callback(Guard(self.settle, signals, self.processes.any_rank))
        self.average: WeightAverage | None = None
        if plan.stage.ema is not None:
            self.average = WeightAverage(aligner.student, plan.stage.ema.decay)
            self.add_callback(UpdateAverage(self.average))
        self.held_out: HeldOut | None = None
        if plan.stage.evaluation is not None:
            self.add_callback(EvaluateEvery(plan.stage.evaluation.every))
            self.held_out = HeldOut(
                aligner,
                reader.layout,
                held_out,
                plan.stage.evaluation,
                seed=seed,
                rank=self.processes.rank,
                ranks=self.processes.world_size,
            )

    def run(self, checkpoint: Path | None = None) -> None:
        """Train the stage, from a checkpoint if there is one, until its last step, a signal or early stopping."""
        if checkpoint is not None and self._had_stopped(checkpoint):
            self._load_from_checkpoint(str(checkpoint))
            self.state.global_step = step_of(checkpoint)
            return
        with cpu_chunks(self.aligner.student):
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _had_stopped(self, checkpoint: Path) -> bool:
        """Return True if early stopping ended the stage at the step of a checkpoint."""
        settings = self.plan.stage.evaluation
        return settings is not None and read_record(checkpoint).is_exhausted(settings.patience)

    @property
    def stopped_early(self) -> bool:
        """True if early stopping ended the stage."""
        return self.held_out is not None and self.held_out.must_stop

    def finish(self) -> int:
        """Give the student the weights that the stage ends with, and return the step that they are of."""
        set_mode(self.optimizer, training=False)
        if self.average is not None:
            self.average.copy_to_student()
        best = None if self.held_out is None else self.held_out.restore_best()
        return self._step if best is None else best

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the stage's optimizer over student matrices, student vectors (no decay), projectors and maps."""
        if self.optimizer is None:
            auxiliary, fitted = self.aligner.auxiliary_parameters(), self.aligner.fitted_parameters()
            self.optimizer = build_optimizer(
                self.aligner.student, auxiliary, self.plan.stage.optimizer, self.plan.mixers, fitted=fitted
            )
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """Return the stage's micro-batches, drawn only when they are needed, so that a saved state is exact."""
        return MicroBatchStream(self.source, self.plan.steps * self.plan.stage.gradient_accumulation)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Draw the micro-batches of one step and work out its normalizers, over all of them and all ranks."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        drawn = [next(epoch_iterator) for _ in range(num_batches)]
        self._tokens = sum(batch.tokens for batch in drawn)
        if self.prefixes is None:
            own = [batch.shard(rank, ranks) for batch in drawn]
        else:
            own = [self.prefixes.own_rows(batch, self._step) for batch in drawn]
        divided = [self.aligner.parts(batch) for batch in own]
        ahead = self.aligner.needs_full_step_features or (num_batches == 1 and len(divided[0]) == 1)
        self._checks = checks.DeferredChecks()
        normalizers = LossNormalizers()
        samples: list[dict[str, Any]] = []
        for parts in divided:
            samples.append({"parts": []})
            for batch in (part.to(device) for part in parts):
                with self._checks.collecting(), checks.renaming_errors(partial(self._named, batch=batch)):
                    features = self.reader.read(batch, sites=self._sites) if ahead else None
                    normalizers = normalizers + self.aligner.normalizers(batch, features, step=self._step)
                samples[-1]["parts"].append({"batch": batch, "features": features})
        self._normalizers = normalizers if ranks == 1 else normalizers.reduced(self._summed_over_ranks)
        self._figures = {}
        self._balance(samples)
        return samples, None

    def _balance(self, samples: list[dict[str, Any]]) -> None:
        """Observe, at the first steps of a stage with `weight: auto`, the gradient of each objective over the step."""
        try:
            observe_gradients(self.aligner, partial(self._backward_alone, samples), step=self._step)
        except NonFiniteLoss:
            # A loss that is not finite is named before the gradient that follows from it.
            self.settle()
            raise
        balance, is_new = self.aligner.balance, self.aligner.balanced_step == self._step
        if balance is not None and balance.done and is_new and self.progress is not None:
            self.progress.balanced(balance.state())

    def _backward_alone(self, samples: list[dict[str, Any]], objective: str) -> None:
        """Run forward and backward of one objective over the step's micro-batches, through the wrapped module."""
        model = self.model_wrapped
        assert model is not None
        parts = [part for sample in samples for part in sample["parts"]]
        for place, sample in enumerate(parts):
            last = place == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(model=model), self._checks.collecting():
                loss = self._output(model, sample["batch"], sample["features"], objective).loss
                if loss.requires_grad:
                    self.accelerator.backward(loss * self.accelerator.num_processes)

    @property
    def _step(self) -> int:
        """Number of optimizer steps that are done."""
        return int(self.state.global_step)

    @property
    def _sites(self) -> tuple[Site, ...]:
        return self.aligner.targets(self._step).sites

    def _summed_over_ranks(self, values: Tensor) -> Tensor:
        total = self.accelerator.reduce(values, reduction="sum")
        assert isinstance(total, Tensor)
        return total

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the parts of a micro-batch forward and backward, leaving the checks of values to the end of the step."""
        losses = []
        for place, part in enumerate(inputs["parts"]):
            last = place == len(inputs["parts"]) - 1
            with nullcontext() if last else self.accelerator.no_sync(model=model), self._checks.collecting():
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the micro-batch's share of the step's loss."""
        output = self._output(model, inputs["batch"], inputs["features"])
        for name, part in output.parts.items():
            self._figures[name] = self._figures.get(name, part.new_zeros(())) + part
        # Data-parallel gradients are averaged over ranks; the sums here are already divided by the global normalizers.
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _output(
        self, model: nn.Module, batch: Batch, features: Features | None, objective: str | None = None
    ) -> AlignerOutput:
        """Return the aligner's output on a micro-batch, of all objectives or of one; the teacher is read if needed."""
        with checks.renaming_errors(partial(self._named, batch=batch)):
            if features is None:
                features = self.reader.read(batch, sites=self._sites)
            return model(
                batch=batch, features=features, normalizers=self._normalizers, step=self._step, objective=objective
            )

    def _named(self, error: XarchError, batch: Batch) -> XarchError:
        """Return the error of a loss that is not finite with the stage, the step and the batch it belongs to."""
        if not isinstance(error, NonFiniteLoss):
            return error
        return NonFiniteLoss(
            f"the loss of stage '{self.plan.stage.name}' is not finite at step {self._step + 1}",
            asked=batch.origin if error.asked is None else f"{error.asked} on {batch.origin}",
            found=error.found or error.message,
            fix=self._where_to_go_on(),
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip gradients as the Trainer does, so that those that are not finite can still be named."""
        if not self.is_replicated:
            return super()._clip_grad_norm(model)
        return clip_gradients(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of all gradients, whose finiteness is the last check of the step."""
        if grad_norm is None and self.is_replicated:
            # Where nothing is clipped; the Trainer would multiply all gradients by a factor, NaN if their norm is.
            grad_norm = gradient_norm(model)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._checks.add(torch.isfinite(torch.as_tensor(norm)), self._gradient_error)
        return norm

    def settle(self) -> None:
        """Settle the checks of the step. Raises NonFiniteLoss, before the optimizer has stepped."""
        self._checks.settle()

    def _gradient_error(self) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"a gradient of stage '{self.plan.stage.name}' is not finite at step {self._step + 1}",
            found=f"parameter {nonfinite_parameter(self.aligner)}",
            fix=self._where_to_go_on(),
        )

    def _where_to_go_on(self) -> str:
        kept = checkpoints(Path(str(self.args.output_dir)))
        state = f"the last good checkpoint is {kept[-1].name}" if kept else "no step of this stage was saved yet"
        return f"{state}; lower the stage's optimizer.lr or look at that batch's text. No optimizer step was taken."

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss parts to what the Trainer logs, and show the step."""
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        parts = dict(zip(self._figures, self._summed_figures(), strict=True))
        loss = sum(parts.values())
        gradient_norm = logs.get("grad_norm")
        prefixes = None if self.prefixes is None else self.prefixes.settle(self._step - 1, self._summed_over_ranks)
        if self.progress is not None:
            self.progress.step(
                StepFigures(
                    step=self.state.global_step,
                    loss=loss,
                    parts=parts,
                    tokens=self._tokens if prefixes is None else round(prefixes.tokens),
                    learning_rate=float(logs.get("learning_rate", math.nan)),
                    gradient_norm=None if gradient_norm is None else float(gradient_norm),
                    prefixes=None if prefixes is None else prefixes.event(),
                    note="" if prefixes is None else prefixes.line,
                )
            )
            if self.prefixes is not None and (reason := self.prefixes.collapse()) is not None:
                self.progress.warning(reason)
        named = {f"{self.plan.stage.name}/{name}": value for name, value in parts.items()}
        super().log({**logs, "loss": loss, **named}, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the student on held-out text; remember the best, and stop when `patience` is exhausted."""
        assert self.held_out is not None
        with self._evaluated_weights():
            figures = self.held_out.measure(self._step, self._summed_over_ranks)
            is_best = self.held_out.observe(figures)
        if self.prefixes is not None:
            self.prefixes.observe(self.held_out.metric_of(figures))
        if self.progress is not None:
            self.progress.evaluation(figures, is_best=is_best)
        named = {f"eval_{self.plan.stage.name}/{name}": value for name, value in figures.parts.items()}
        metrics = {"eval_loss": figures.loss, "eval_nll": figures.nll, **named}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.stopped_early:
            self.control.should_training_stop = True
        return metrics

    @contextmanager
    def _evaluated_weights(self) -> Iterator[None]:
        """Run the block with the weights that the stage would end with: those of an average, if there is one."""
        set_mode(self.optimizer, training=False)
        with nullcontext() if self.average is None else self.average.applied():
            yield
        set_mode(self.optimizer, training=True)

    def _summed_figures(self) -> list[float]:
        """Return the loss parts of the step, summed over ranks, and copied from the device at once."""
        if not self._figures:
            return []
        values = torch.stack([part.double() for part in self._figures.values()])
        return (values if self.processes.world_size == 1 else self._summed_over_ranks(values)).tolist()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the tensors that this stage trains and its source's state; the rest is restored from earlier stages."""
        folder = Path(output_dir or str(self.args.output_dir))
        write_state(self.aligner, folder / STATE_FILE)
        write_json(folder / SOURCE_FILE, self.source.state_dict())
        if self.held_out is not None:
            self.held_out.save(folder)
        if self.average is not None:
            self.average.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.aligner.load_trained_state(folder / STATE_FILE)
        self.source.load_state_dict(read_source_state(folder / SOURCE_FILE))
        if self.prefixes is not None:
            self.prefixes.load(folder)
        if self.held_out is not None:
            self.held_out.load(folder)
        if self.average is not None:
            self.average.load(folder)

    def _get_output_dir(self, trial: Any) -> str:
        return str(staging_of(Path(str(self.args.output_dir))))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint, to which every rank adds its random numbers and prefixes; rank 0 writes all else."""
        folder, step = Path(str(self.args.output_dir)), self._step
        with staged_checkpoint(folder, step, self.processes) as staged:
            if staged is not None:
                super()._save_checkpoint(model, trial)
                if self.prefixes is not None:
                    self.prefixes.save(staged)
