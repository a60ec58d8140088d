"""Evaluation of a stage on held-out text while it trains: loss parts, NLL, the best so far, early stopping."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from xarch_kd.data.batches import Batch
from xarch_kd.errors import CheckpointError, DataError, NonFiniteLoss
from xarch_kd.files import read_tensors, write_json, write_tensors
from xarch_kd.mapping_file.training import StageEvaluation
from xarch_kd.objectives.base import tensor
from xarch_kd.objectives.next_token import HEAD_INPUT, head_of
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.ops.streaming.nll import streamed_nll
from xarch_kd.run.progress import HeldOutFigures
from xarch_kd.taps.layout import Layout
from xarch_kd.taps.trace import trace
from xarch_kd.teacher.feature_cache import MemoryCache
from xarch_kd.teacher.reader import TeacherFeatures
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.stage_setup import evaluation_mode

# Beside the other files of a checkpoint.
RECORD_FILE: Final = "held_out.json"
BEST_FILE: Final = "best.safetensors"
# Features of the teacher beyond this are read again at each evaluation.
FEATURE_BYTES: Final = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Record:
    """The best evaluation so far, and the number of evaluations since it."""

    best_step: int | None = None
    best_value: float | None = None
    since_best: int = 0

    def after(self, step: int, value: float) -> Record:
        """Return the record after another evaluation; the first of equal values stays the best."""
        if self.best_value is None or value < self.best_value:
            return Record(best_step=step, best_value=value)
        return Record(best_step=self.best_step, best_value=self.best_value, since_best=self.since_best + 1)

    def is_exhausted(self, patience: int | None) -> bool:
        """Return True if the stage is to stop."""
        return patience is not None and self.since_best >= patience


class HeldOut:
    """Held-out batches of a stage, the figures on them, and the weights of the best evaluation.

    `batches` are whole micro-batches, of which this process reads its rows. Features of the teacher are kept in main
    memory up to 2 GiB. Measuring changes neither the mode of a module nor the state of random numbers.

    Raises DataError if no token of the batches is to be predicted.
    """

    def __init__(
        self,
        aligner: Aligner,
        teacher: Layout,
        batches: Iterable[Batch],
        settings: StageEvaluation,
        *,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.settings = settings
        self.record = Record()
        self._aligner, self._seed = aligner, seed
        whole = tuple(batches)
        self.tokens = sum(batch.predictions for batch in whole)
        if self.tokens == 0:
            raise DataError(
                "a stage is evaluated on held-out text, and there is none",
                asked=f"stages[{aligner.stage.index}].evaluation",
                found=f"{len(whole)} batches without a token to predict",
                fix="raise data.held_out, or leave out the stage's evaluation",
            )
        fewest = min(batch.input_ids.shape[0] for batch in whole)
        if fewest < ranks:
            raise DataError(
                "there are fewer held-out rows than processes",
                asked=f"stages[{aligner.stage.index}].evaluation",
                found=f"a batch of {fewest} rows for {ranks} processes",
                fix="raise data.held_out, or start fewer processes",
            )
        own = (batch.shard(rank, ranks) for batch in whole)
        self._batches = tuple(part for batch in own for part in aligner.parts(batch))
        self._reader = TeacherFeatures(teacher, aligner.targets().sites, MemoryCache(FEATURE_BYTES))
        self._best: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, steps: int, summed: Callable[[Tensor], Tensor]) -> HeldOutFigures:
        """Return the figures after `steps` steps, with the weights that objectives had at the last of them.

        `summed` returns the sum of a float64 vector over all ranks. Raises NonFiniteLoss.
        """
        device = next(self._aligner.student.parameters()).device
        step = steps - 1
        batches = [batch.to(device) for batch in self._batches]
        with evaluation_mode(self._aligner), _own_random_numbers(self._seed, device):
            normalizers = LossNormalizers()
            for batch in batches:
                features = self._reader.read(batch, sites=self._sites(step))
                normalizers = normalizers + self._aligner.normalizers(batch, features, step=step)
            normalizers = normalizers.reduced(summed)
            parts: dict[str, Tensor] = {}
            nll = torch.zeros((), dtype=torch.float64, device=device)
            for batch in batches:
                features = self._reader.read(batch, sites=self._sites(step))
                output = self._aligner(batch=batch, features=features, normalizers=normalizers, step=step)
                for name, part in output.parts.items():
                    parts[name] = parts.get(name, torch.zeros_like(nll)) + part.double()
                # Of documents that a row isolates, each is a row of its own.
                for part in batch.apart():
                    nll = nll + self._nll(part)
        *values, total = summed(torch.stack([*parts.values(), nll])).tolist()
        if total != total or total in (float("inf"), float("-inf")):
            raise NonFiniteLoss(
                "the student's likelihood of held-out text is not finite",
                asked=f"stage '{self._aligner.stage.stage.name}' after step {steps}",
            )
        figures = dict(zip(parts, values, strict=True))
        return HeldOutFigures(
            step=steps, loss=sum(figures.values()), parts=figures, nll=total / self.tokens, tokens=self.tokens
        )

    def observe(self, figures: HeldOutFigures) -> bool:
        """Take figures into account; return True if they are the best so far, whose weights are then kept.

        Figures measured while the weights of objectives are still being balanced are not compared with later ones.
        """
        balance = self._aligner.balance
        if self.settings.metric == "loss" and balance is not None and not balance.done:
            return False
        value = self.metric_of(figures)
        self.record = self.record.after(figures.step, value)
        is_best = self.record.best_step == figures.step
        if is_best and self.settings.keep == "best":
            self._best = {
                name: value.detach().to("cpu", copy=True) for name, value in self._aligner.trained_state().items()
            }
        return is_best

    def metric_of(self, figures: HeldOutFigures) -> float:
        """Return the value of the stage's metric."""
        return figures.loss if self.settings.metric == "loss" else figures.nll

    @property
    def must_stop(self) -> bool:
        """True once `patience` evaluations in a row were not the best."""
        return self.record.is_exhausted(self.settings.patience)

    @property
    def notice(self) -> str | None:
        """Line about `keep: best` without an evaluation to compare; None otherwise."""
        if self.settings.keep == "last" or self.record.best_step is not None:
            return None
        return (
            "its evaluations all came before weight: auto was balanced and were not compared, so that the last weights "
            "are kept and not the best"
        )

    def restore_best(self) -> int | None:
        """Copy the weights of the best evaluation into the aligner and return its step; None with `keep: last`."""
        if not self._best:
            return None
        self._aligner.copy_trained_state(self._best)
        return self.record.best_step

    def save(self, folder: Path) -> None:
        """Write the record, and the weights of the best evaluation, into a checkpoint."""
        write_json(folder / RECORD_FILE, asdict(self.record))
        if self._best:
            write_tensors(folder / BEST_FILE, self._best)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint. Raises CheckpointError if it lacks what `save` wrote."""
        self.record = read_record(folder)
        self._best = {}
        if self.settings.keep == "best" and self.record.best_step is not None:
            self._best, _ = read_tensors(folder / BEST_FILE)

    def _sites(self, step: int) -> Any:
        return self._aligner.targets(step).sites

    def _nll(self, batch: Batch) -> Tensor:
        """Return the student's summed negative log-likelihood of the tokens that count, float64."""
        layout = self._aligner.layout
        with self._aligner.autocast(batch.device):
            found = trace(
                layout, batch.input_ids, batch.model_mask, taps={HEAD_INPUT.tap: None}, position_ids=batch.position_ids
            )
        hidden, labels = tensor(found.at(*HEAD_INPUT)).flatten(0, 1), batch.next_tokens.flatten()
        at = torch.arange(len(labels), device=labels.device) if batch.predicted is None else batch.predicted
        if len(at) == 0:
            return torch.zeros((), dtype=torch.float64, device=labels.device)
        return streamed_nll(hidden[at], head_of(layout), labels[at]).double().sum()


def read_record(folder: Path) -> Record:
    """Return the record of a checkpoint. Raises CheckpointError if it is missing or damaged."""
    path = folder / RECORD_FILE
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}", found=str(error), fix="delete the checkpoint and run again with --resume"
    )


@contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Run the block on random numbers of its own: the same at each evaluation, and training does not notice."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
