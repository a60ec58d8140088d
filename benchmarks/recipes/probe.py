"""Step times of the arms: all of them in this process, one after another in every round.

Wall times of whole runs on a shared machine vary by more than the arms differ, so the number of steps at equal wall
time follows from these figures and not from the runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.recipes.arms import Arm, seeded
from xarch_kd.data.batches import Batch
from xarch_kd.files import write_text
from xarch_kd.job.models import load_models, load_run_tokenizer
from xarch_kd.job.texts import run_text
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.report import Reporter
from xarch_kd.training.aligner import Aligner

ROUNDS = 5


def probe(arms: Sequence[Arm], folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return for each arm, stage by stage, the median seconds of the teacher's pass and of the student's step.

    An arm whose step time is another's (`costs_like`) is not measured.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for group in dict.fromkeys(arm.group for arm in arms):
        steps = {
            (arm.name, index): step
            for arm in arms
            if arm.group == group and arm.costs_like == arm.name
            for index, step in enumerate(_steps(arm, folder))
        }
        times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in steps}
        for turn in range(ROUNDS + 1):
            for key, step in steps.items():
                taken = step()
                # The first round allocates memory and fills caches.
                times[key] += [taken] if turn else []
        for (name, _), taken in times.items():
            teacher, student = (statistics.median(column) for column in zip(*taken, strict=True))
            found.setdefault(name, []).append({"teacher_seconds": teacher, "student_seconds": student})
    return found


def training_seconds(mapping: dict[str, Any], steps: Sequence[dict[str, float]]) -> float:
    """Return the seconds of a mapping file's stages: the teacher's passes over distinct batches, and the steps."""
    return sum(
        min(stage.get("batches", stage["steps"]), stage["steps"]) * figures["teacher_seconds"]
        + stage["steps"] * figures["student_seconds"]
        for stage, figures in zip(mapping["stages"], steps, strict=True)
    )


def _steps(arm: Arm, folder: Path) -> list[Callable[[], tuple[float, float]]]:
    """Return one function per stage, which runs a step and returns the teacher's and the student's seconds."""
    path = folder / f"probe-{arm.name}.yaml"
    write_text(path, yaml.safe_dump(seeded(arm.mapping, 0), sort_keys=False))
    plan = make_plan(path)
    tokenizer = load_run_tokenizer(plan)
    models = load_models(plan, tokenizer, lambda _: None)
    rows = run_text(plan, tokenizer, Reporter.silent()).training
    return [
        _step(
            Aligner(plan, teacher=models.teacher, student=models.student, stage=stage.index),
            rows.batch(range(stage.batch_size), origin="a probe"),
        )
        for stage in plan.stages
    ]


def _step(aligner: Aligner, batch: Batch) -> Callable[[], tuple[float, float]]:
    trained = [name for name, parameter in aligner.named_parameters() if parameter.requires_grad]
    parameters = [parameter for name, parameter in aligner.named_parameters() if name in set(trained)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> tuple[float, float]:
        # Another stage of the same student may have frozen parameters that this one trains.
        for name, parameter in aligner.named_parameters():
            parameter.requires_grad_(name in trained)
        began = time.perf_counter()
        features = aligner.reader.read(batch)
        read = time.perf_counter()
        aligner(batch=batch, features=features).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return read - began, time.perf_counter() - read

    return step
