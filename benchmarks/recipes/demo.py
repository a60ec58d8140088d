"""The demo's recipe against distillation from logits alone in the same wall time.

Two kinds of run, each a process of its own, one after another:

1. the demo's mapping file, as shipped;
2. distillation from logits alone of the same student with the same initialization, in the wall time of the demo's
   training, once per learning rate of `BASELINE_RATES`; the demo is compared with the best of them.

The number of steps in that wall time follows from the demo's own last stage, whose steps are the same. Figures are NLL
in nats per token, both models in float32, on the held-out part of the training corpus and on text of another kind; peak
memory is the resident set of the training process. Finished run folders are reused, so that the table can be resumed.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from xarch_kd._layout import folder
from xarch_kd.evaluation.results import Evaluation, read_evaluation
from xarch_kd.files import sha256_of, write_text
from xarch_kd.run.folder import environment

DEMO = folder("mappings") / "smollm2-135m--mamba2-hybrid.yaml"
# The best of 1e-3, 3e-3 and 6e-3 in earlier runs of about this length.
BASELINE_RATES = (3e-3,)
BOUNDS = {
    "held_out_gap": 0.06,
    "other_kind_gap": 0.10,
    "training_seconds": 300.0,
    "peak_gib": 4.0,
    "share_of_baseline": 0.5,
}


def demo_table(runs: Path, output: Path) -> None:
    """Run the demo and its baseline and write their table."""
    runs.mkdir(parents=True, exist_ok=True)
    demo = run(DEMO, runs / "demo")
    fitting = max(1, int(demo["training_seconds"] / logit_step(runs / "demo")))
    baselines = [logits_only(rate, fitting, runs) for rate in BASELINE_RATES]
    best = min(baselines, key=lambda figures: figures["held_out_gap"])
    result = {
        "environment": environment(),
        "mapping": {"file": DEMO.name, "sha256": sha256_of(DEMO)},
        "bounds": BOUNDS,
        "demo": demo,
        "logits_only": baselines,
        "share_of_best_baseline": demo["held_out_gap"] / best["held_out_gap"],
    }
    write_text(output, json.dumps(result, indent=2) + "\n")
    write_text(output.with_suffix(".md"), table(result))
    print(table(result))


def run(mapping: Path, output: Path) -> dict[str, Any]:
    """Train and measure `mapping` into `output` (or take the finished run) and return its figures."""
    command = [sys.executable, "-m", "xarch_kd", "train", str(mapping), "--output", str(output)]
    subprocess.run([*command, "--resume"] if output.exists() else command, check=True)
    saved = next(event for event in events(output) if event["event"] == "saved")
    return {
        "run": output.name,
        "steps": sum(event["event"] == "step" for event in events(output)),
        "training_seconds": saved["training_seconds"],
        "peak_gib": round(saved["peak_bytes"] / 2**30, 3),
        **gaps(read_evaluation(output / "evaluation.json")),
    }


def gaps(evaluation: Evaluation) -> dict[str, Any]:
    """Return the held-out figures and those of the first text of another kind."""
    held_out, other = evaluation.likelihood[0], evaluation.likelihood[1]
    return {
        "teacher_held_out": held_out.teacher_nll,
        "student_held_out": held_out.student_nll,
        "held_out_gap": held_out.difference,
        "held_out_interval": [held_out.low, held_out.high],
        "other_kind_gap": other.difference,
        "other_kind_interval": [other.low, other.high],
    }


def events(output: Path) -> list[dict[str, Any]]:
    """Return the events of a run."""
    return [json.loads(line) for line in (output / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def logit_step(output: Path) -> float:
    """Return the median seconds of a step of the run's last stage, whose steps are those of the baseline."""
    steps = [event for event in events(output) if event["event"] == "step"]
    times = [event["time"] for event in steps if event["stage"] == steps[-1]["stage"]]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


def logits_only(rate: float, steps: int, runs: Path) -> dict[str, Any]:
    """Distil from logits alone for `steps` steps at learning rate `rate` and return the figures."""
    name = f"logits-only-{rate:g}"
    if not (runs / name).exists():
        write_baseline(runs / f"{name}.yaml", steps=steps, rate=rate)
    return {"rate": rate, **run(runs / f"{name}.yaml", runs / name)}


def write_baseline(path: Path, *, steps: int, rate: float) -> None:
    """Write the demo's mapping file with its last stage alone, of `steps` steps at learning rate `rate`."""
    mapping = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    stage = next(stage for stage in reversed(mapping["stages"]) if "tokens" in stage)
    stage |= {"steps": steps, "optimizer": {**stage.get("optimizer", {}), "lr": rate}}
    stage.pop("batches", None)
    mapping["stages"] = [stage]
    write_text(path, yaml.safe_dump(mapping, sort_keys=False))


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    demo, machine = result["demo"], result["environment"]
    lines = [
        "# Recipes on a real teacher",
        "",
        f"Made by `python -m benchmarks.recipes` from `{result['mapping']['file']}` (SHA-256 "
        f"`{result['mapping']['sha256'][:12]}`), {machine['processors']} processors, {machine['threads']} threads, "
        f"torch {machine['torch']}, transformers {machine['transformers']}. Gaps are student - teacher NLL in nats per "
        "per token, with 95 % intervals.",
        "",
        "| run | steps | training s | peak GiB | held-out gap | gap on text of another kind |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in [
        ("demo", demo),
        *((f"logits only, lr {row['rate']:g}", row) for row in result["logits_only"]),
    ]:
        lines.append(
            f"| {name} | {row['steps']} | {row['training_seconds']:.0f} | {row['peak_gib']:.2f} "
            f"| {interval(row['held_out_gap'], row['held_out_interval'])} "
            f"| {interval(row['other_kind_gap'], row['other_kind_interval'])} |"
        )
    held = {
        "held-out gap": (demo["held_out_gap"], BOUNDS["held_out_gap"]),
        "gap on text of another kind": (demo["other_kind_gap"], BOUNDS["other_kind_gap"]),
        "training seconds": (demo["training_seconds"], BOUNDS["training_seconds"]),
        "peak GiB": (demo["peak_gib"], BOUNDS["peak_gib"]),
        "share of the best logits-only gap": (result["share_of_best_baseline"], BOUNDS["share_of_baseline"]),
    }
    lines += ["", "| bound | measured | allowed | held |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {value:.3f} | {bound:g} | {'yes' if value <= bound else 'no'} |"
        for name, (value, bound) in held.items()
    ]
    return "\n".join(lines) + "\n"


def interval(value: float, ends: list[float | None]) -> str:
    """Return a figure with its interval."""
    low, high = ends
    return f"{value:+.4f}" if low is None or high is None else f"{value:+.4f} ({low:+.4f} to {high:+.4f})"
