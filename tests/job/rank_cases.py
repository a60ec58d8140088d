"""Runs of tests/job/test_ranks.py on every rank of one launch: `rank_cases.py RUNS.json`.

The file lists [mapping file, output folder, resume, interrupt at step]. Results are left in the folders.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers.utils import logging

from xarch_kd.errors import XarchError
from xarch_kd.job.train import train
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.progress import StageProgress, StepFigures

RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})


def interrupt_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Send rank 1, and no other, a SIGTERM when `step` steps are over."""
    original = StageProgress.step

    def stopping(self: StageProgress, figures: StepFigures) -> None:
        original(self, figures)
        if figures.step == step and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(StageProgress, "step", stopping)


def main(runs: Path) -> None:
    """Train each mapping file, and write the error of a run that failed into a file of this rank."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    for mapping, output, resume, interrupted_at in json.loads(runs.read_text()):
        path = Path(mapping.replace("RANK", rank))
        with pytest.MonkeyPatch.context() as patch:
            if interrupted_at is not None:
                interrupt_at(interrupted_at, patch)
            try:
                train(make_plan(path, rates=RATES), output, resume=resume)
            except XarchError as error:
                errors = runs.with_name(f"{Path(output).name}-error-{rank}.txt")
                errors.write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
