"""Exponential moving average of the student's weights over the steps of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import nn

from xarch_kd.errors import CheckpointError
from xarch_kd.files import read_tensors, write_tensors

# Beside the other files of a checkpoint.
AVERAGE_FILE: Final = "ema.safetensors"


def decay_at(decay: float, step: int) -> float:
    """Return the decay of the update after `step` steps, min(decay, (1 + step) / (10 + step)).

    The lower decay of the first steps makes the average forget the weights that the stage began with, which in a short
    stage would outweigh all that was learned.
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """Average of the trained parameters of a student, float32, as they are when it is made.

    >>> import torch
    >>> from xarch_kd.training.ema import WeightAverage
    >>> student = torch.nn.Linear(1, 1, bias=False)
    >>> average = WeightAverage(student, decay=0.5)
    >>> with torch.no_grad():
    ...     before = float(student.weight)
    ...     _ = student.weight.add_(1.0)
    >>> average.update(step=100)
    >>> average.copy_to_student()
    >>> round(float(student.weight) - before, 4)
    0.5
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {
            name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad
        }
        self._average = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after `step` steps of the stage."""
        share = 1.0 - decay_at(self.decay, step)
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter.float(), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the block with the average as the student's weights; nothing is copied, and nothing may train in it."""
        trained = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self._average[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = trained[name]

    @torch.no_grad()
    def copy_to_student(self) -> None:
        """Give the student the average as its weights."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._average[name])

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        write_tensors(folder / AVERAGE_FILE, self._average)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Continue from a checkpoint. Raises CheckpointError for one of other parameters, or a damaged one."""
        path = folder / AVERAGE_FILE
        stored, _ = read_tensors(path)
        if stored.keys() != self._average.keys():
            different = sorted(stored.keys() ^ self._average.keys())
            raise CheckpointError(
                f"{path} does not hold what this stage trains",
                found=f"{len(different)} names differ, e.g. {different[0]}",
                fix="it belongs to another version of this run; give another --output",
            )
        for name, value in self._average.items():
            value.copy_(stored[name])
