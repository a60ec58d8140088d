"""Runs of tests/job/test_ranks.py on every rank.

A file of cases holds `teacher`, a folder for the gradients, and `runs`: a mapping file (RANK in its name is the rank),
its output folder, and what happens on rank 1 alone (`interrupt_at`, `fail_at` a step; `other_data`). Results are files
in its folder.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.training.test_micro_batches import HYBRID, TRANSFORMER, aligner_of, large_and_small, run
from xarch_kd.errors import DataError, XarchError
from xarch_kd.job import texts
from xarch_kd.job.train import train
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.processes import joined_processes
from xarch_kd.run.progress import StageProgress, StepFigures
from xarch_kd.testing.tiny import tiny_model
from xarch_kd.training.aligner import Aligner

RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})


def disturb(patch: pytest.MonkeyPatch, case: dict[str, Any]) -> None:
    """Make rank 1 receive a signal or fail after a step, or read other text, as the case asks for."""
    step, pack = StageProgress.step, texts.pack

    def disturbed(self: StageProgress, figures: StepFigures) -> None:
        step(self, figures)
        if figures.step == case.get("interrupt_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        if figures.step == case.get("fail_at"):
            raise DataError("the disk of rank 1 is broken")

    patch.setattr(StageProgress, "step", disturbed)
    if "other_data" in case:
        patch.setattr(
            texts,
            "pack",
            lambda documents, *rest, **options: pack(documents.select(range(len(documents))[::-1]), *rest, **options),
        )


def train_runs(runs: list[dict[str, Any]], folder: Path) -> None:
    """Train each mapping file, and write the error of a run that failed into a file of this rank."""
    rank = os.environ["RANK"]
    for case in runs:
        mapping, output = case["mapping"].replace("RANK", rank), case["output"]
        with pytest.MonkeyPatch.context() as patch:
            if rank == "1":
                disturb(patch, case)
            try:
                train(make_plan(mapping, rates=RATES), output, resume=case.get("resume", False))
            except XarchError as error:
                text = f"{type(error).__name__}: {error}"
                (folder / f"{Path(output).name}-error-{rank}.txt").write_text(text)


def gradient_errors(teacher_folder: Path) -> dict[str, float]:
    """Return how far the gradients of two ranks are from those of one process, relative to all gradients' norm.

    By objective, on rows with unequal numbers of tokens and labels that count.
    """
    teacher = tiny_model("llama").requires_grad_(False)
    large, _ = large_and_small()
    found = {}
    with joined_processes(torch.device("cpu")) as processes:
        for hybrid, stages in ((True, HYBRID), (False, TRANSFORMER)):
            for name, stage in stages.items():
                aligner = aligner_of(teacher_folder, teacher, stage, hybrid)
                (whole,), expected = run(aligner, [large])
                loss, gradients = on_this_rank(aligner, processes.rank)
                scale = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
                errors = [float((gradients[key] - expected[key]).norm() / scale) for key in expected]
                errors.append(abs(loss / float(whole.loss.detach()) - 1))
                found[f"{'hybrid' if hybrid else 'transformer'} {name}"] = max(errors)
    return found


def on_this_rank(aligner: Aligner, rank: int) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of a step whose rows are split over two replicas."""
    aligner.zero_grad()
    replica = DistributedDataParallel(aligner, find_unused_parameters=True, broadcast_buffers=False)
    own = large_and_small()[0].shard(rank, 2)
    features = aligner.reader.read(own)

    def summed(values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    normalizers = aligner.normalizers(own, features).reduced(summed)
    output = replica(batch=own, features=features, normalizers=normalizers)
    (2 * output.loss).backward()
    gradients = {name: p.grad for name, p in aligner.named_parameters() if p.grad is not None}
    return float(summed(output.loss.detach().clone())), gradients


def main(path: Path) -> None:
    """Run everything that the file asks for."""
    cases = json.loads(path.read_text())
    errors = gradient_errors(Path(cases["teacher"]))
    (path.parent / f"gradients-{os.environ['RANK']}.json").write_text(json.dumps(errors))
    train_runs(cases["runs"], path.parent)
