"""Runs of the table of strategies: a process each, measured here and stored in `figures.json` of its folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.machine import ROOT
from benchmarks.recipes.arms import MEASURED_TOKENS, Arm, seeded
from xarch_kd.data.batches import Batch
from xarch_kd.evaluation.likelihood import token_nll
from xarch_kd.files import write_text
from xarch_kd.job.models import load_run_tokenizer
from xarch_kd.job.texts import read_batches, run_text
from xarch_kd.models.loading.load import load_model
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.report import Reporter

PREPARED = re.compile(r"(?:calibration on about|fitted to) [\d,]+ tokens(?: in|:) ([\d.]+) s")


class Runs:
    """The folder of all runs. Students are measured one at a time, whatever the number of workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._measuring = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, arm: Arm, seed: int) -> Path:
        """Return the run folder of an arm."""
        return self.folder / f"{arm.name}-seed-{seed}"

    def known(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """Return the figures of a finished run, or None."""
        path = self.path(arm, seed) / "figures.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def figures(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Train and measure an arm and return its figures; a finished run is reused, an unfinished one resumed."""
        found = self.known(arm, seed)
        if found is not None:
            return found
        run = self.path(arm, seed)
        mapping = self.folder / f"{run.name}.yaml"
        write_text(mapping, yaml.safe_dump(seeded(arm.mapping, seed), sort_keys=False))
        began = time.perf_counter()
        if not (run / "manifest.json").exists():
            _train(mapping, run)
        wall = time.perf_counter() - began
        with self._measuring:
            teacher, student = self._measured(make_plan(mapping), run)
        figures = {
            "arm": arm.name,
            "seed": seed,
            "teacher_nll": teacher,
            "student_nll": student,
            "gap": student - teacher,
            "wall_seconds": round(wall, 1),
            "prepared_seconds": prepared_seconds(run.with_suffix(".log")),
            **trained(run),
        }
        write_text(run / "figures.json", json.dumps(figures, indent=2) + "\n")
        # The weights of sixty students are tens of gigabytes.
        for part in ("student", "stages"):
            shutil.rmtree(run / part, ignore_errors=True)
        return figures

    def _measured(self, plan: Plan, run: Path) -> tuple[float, float]:
        """Return the held-out NLL of teacher and student, in nats per token, both in float32."""
        tokenizer = load_run_tokenizer(plan)
        held_out = run_text(plan, tokenizer, Reporter.silent()).held_out()
        rows = read_batches(held_out, MEASURED_TOKENS, plan.mapping.data.batch_size)
        kept = self.folder / f"teacher-seed-{plan.mapping.seed}.json"
        if not kept.exists():
            write_text(kept, json.dumps(_nll(plan.mapping.teacher.model, rows)))
        return json.loads(kept.read_text(encoding="utf-8")), _nll(str(run / "student"), rows)


def _nll(reference: str, rows: list[Batch]) -> float:
    return float(token_nll(load_model(reference, dtype=torch.float32), rows).double().nanmean())


def _train(mapping: Path, run: Path) -> None:
    """Train in a process of its own with one thread and this checkout's package."""
    command = [sys.executable, "-m", "xarch_kd", "train", str(mapping.resolve()), "--output", str(run.resolve())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with run.with_suffix(".log").open("a", encoding="utf-8") as log:
        subprocess.run(
            [*command, "--resume"] if run.exists() else command,
            check=True,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def trained(run: Path) -> dict[str, Any]:
    """Return steps, seconds, memory and the last loss of each stage from the events of a run."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    saved = next(event for event in events if event["event"] == "saved")
    steps = [event for event in events if event["event"] == "step"]
    return {
        "steps": len(steps),
        "training_seconds": saved["training_seconds"],
        "peak_gib": round(saved["peak_bytes"] / 2**30, 3),
        "last_losses": {event["stage"]: round(event["loss"], 4) for event in steps},
    }


def prepared_seconds(log: Path) -> float:
    """Return the seconds in a run's log for calibration and for fits before the first step."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return sum(float(seconds) for seconds in PREPARED.findall(text))
