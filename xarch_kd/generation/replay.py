"""Replay buffer of rollouts, written to disk with each checkpoint of a stage."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from xarch_kd.errors import CheckpointError
from xarch_kd.files import read_tensors, write_tensors
from xarch_kd.generation.rollouts import Row


class ReplayBuffer:
    """This process's rows of the last `capacity` micro-batches that were sampled.

    Every process puts in its rows of the same micro-batches, so that all have the same number of them. Rows older than
    `max_age` steps are not drawn.

    >>> import torch
    >>> buffer = ReplayBuffer(capacity=2, max_age=None)
    >>> for step in range(3):
    ...     buffer.put([Row(ids=torch.tensor([step]), counts=torch.tensor([True]))], step=step)
    >>> sorted({int(row.ids) for row in buffer.draw(20, step=3, seed=0)})
    [1, 2]
    """

    def __init__(self, *, capacity: int, max_age: int | None) -> None:
        self.capacity = capacity
        self.max_age = max_age
        self._kept: deque[tuple[int, tuple[Row, ...]]] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self._kept)

    def put(self, rows: Sequence[Row], *, step: int) -> None:
        """Put this process's rows of a micro-batch sampled at `step` into the buffer; the oldest leaves a full one."""
        self._kept.append((step, tuple(rows)))

    def is_empty(self, step: int) -> bool:
        """Return True if no row is young enough to be drawn at `step`."""
        return not self._young(step)

    def draw(self, count: int, *, step: int, seed: int) -> list[Row]:
        """Return `count` rows that are young enough at `step`, each drawn uniformly among them."""
        rows = self._young(step)
        chosen = torch.randint(len(rows), (count,), generator=torch.Generator().manual_seed(seed))
        return [rows[place] for place in chosen.tolist()]

    def _young(self, step: int) -> list[Row]:
        return [
            row
            for sampled, rows in self._kept
            if self.max_age is None or step - sampled <= self.max_age
            for row in rows
        ]

    def save(self, path: Path) -> None:
        """Write the buffer to a safetensors file. Raises CheckpointError if it cannot be written."""
        rows = [row for _, group in self._kept for row in group]
        empty = torch.zeros(0, dtype=torch.long)
        write_tensors(
            path,
            {
                "ids": torch.cat([empty, *(row.ids for row in rows)]).int(),
                "counts": torch.cat([empty.bool(), *(row.counts for row in rows)]).byte(),
                "lengths": torch.tensor([len(row.ids) for row in rows], dtype=torch.long),
                "rows": torch.tensor([len(group) for _, group in self._kept], dtype=torch.long),
                "steps": torch.tensor([step for step, _ in self._kept], dtype=torch.long),
            },
        )

    def load(self, paths: Sequence[Path], *, rank: int, ranks: int) -> None:
        """Take the rows that `save` wrote in place of the own ones: of several processes' files, a share of each.

        Raises CheckpointError for a file without them, and for files of different runs.
        """
        stored = [_read(path) for path in paths]
        self._kept.clear()
        for groups in zip(*stored, strict=True):
            step = groups[0][0]
            rows = [row for _, own in groups for row in own]
            self.put(rows if len(paths) == 1 else rows[rank::ranks], step=step)


def _read(path: Path) -> list[tuple[int, list[Row]]]:
    """Return the step and the rows of each micro-batch of a file."""
    stored, _ = read_tensors(path)
    try:
        lengths = stored["lengths"].tolist()
        ids = stored["ids"].long().split(lengths)
        counts = stored["counts"].bool().split(lengths)
        rows = [Row(ids=own, counts=mask) for own, mask in zip(ids, counts, strict=True)]
        found = []
        for step, count in zip(stored["steps"].tolist(), stored["rows"].tolist(), strict=True):
            found.append((step, rows[:count]))
            rows = rows[count:]
        return found
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold a replay buffer", found=str(error)) from error
