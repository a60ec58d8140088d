"""Readers of run folders and interruption of runs, for tests of the main job."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from xarch_kd.run.progress import StageProgress, StepFigures


def student_of(run: Path) -> dict[str, Tensor]:
    """Return the student's weights by name."""
    return load_file(run / "student" / "model.safetensors")


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Return True if two sets of weights are bitwise equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def events_of(run: Path) -> list[dict[str, Any]]:
    """Return the events of a run in order."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def flip_bit(path: Path) -> None:
    """Change one bit in the last bytes of a file, which are data in safetensors and in most other formats."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@contextmanager
def signal_after(steps: int, *numbers: int) -> Iterator[None]:
    """Send this process the signals (by default SIGTERM) when `steps` steps are done inside the block."""
    seen = 0
    step = StageProgress.step

    def stopping(self: StageProgress, figures: StepFigures) -> None:
        nonlocal seen
        step(self, figures)
        seen += 1
        if seen == steps:
            for number in numbers or (signal.SIGTERM,):
                os.kill(os.getpid(), number)

    StageProgress.step = stopping  # type: ignore[method-assign]
    try:
        yield
    finally:
        StageProgress.step = step  # type: ignore[method-assign]
