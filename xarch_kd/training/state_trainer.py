"""A `transformers.Trainer` whose checkpoints hold no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from transformers import Trainer

from xarch_kd.training.state_files import (
    OPTIMIZER_FILE,
    SCALER_FILE,
    SCHEDULER_FILE,
    random_file,
    random_state,
    read_tree,
    set_random_state,
    write_tree,
)

# Every process holds all parameters and, once they are reduced, all gradients.
REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class StateTrainer(Trainer):
    """Trainer that stores optimizer, scheduler, gradient scaler and random numbers as safetensors.

    Where parameters are sharded, optimizer and scheduler are stored in the format of what shards them.
    """

    @property
    def is_replicated(self) -> bool:
        """True where every process holds all parameters."""
        return self.accelerator.distributed_type in REPLICATED

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_replicated:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            for name, part in self._stateful().items():
                write_tree(Path(output_dir) / name, part.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_replicated:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            for name, part in self._stateful().items():
                part.load_state_dict(read_tree(Path(checkpoint) / name))

    def _stateful(self) -> dict[str, Any]:
        """Return optimizer and scheduler by the file that holds their state."""
        return {OPTIMIZER_FILE: self.optimizer, SCHEDULER_FILE: self.lr_scheduler}

    def _save_scaler(self, output_dir: str) -> None:
        scaler: Any = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            write_tree(Path(output_dir) / SCALER_FILE, scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler: Any = getattr(self.accelerator, "scaler", None)
        if scaler is not None and checkpoint is not None and (Path(checkpoint) / SCALER_FILE).exists():
            scaler.load_state_dict(read_tree(Path(checkpoint) / SCALER_FILE))

    def _save_rng_state(self, output_dir: str) -> None:
        name = random_file(self.args.process_index, self.args.world_size)
        write_tree(Path(output_dir) / name, random_state(self.args.device))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / random_file(self.args.process_index, self.args.world_size)
        # A checkpoint of another number of ranks has random numbers of other ranks.
        if path.exists():
            set_random_state(read_tree(path), self.args.device)
