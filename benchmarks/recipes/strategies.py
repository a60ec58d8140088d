"""Layer maps and conversions on a real teacher: equal tokens and equal wall time, three seeds, with intervals.

    python -m benchmarks.recipes --table strategies [--plan | --stored] [--workers 2] [--seeds 0 1 2]

The arms are in `arms`. First a step of each arm is timed (`probe`), which gives the number of steps of a cheaper arm in
the wall time of a dearer one. Then the arms of equal tokens run, seed by seed, then those of equal wall time, each run
a process of its own. Results and table are written after every run, and finished runs are reused.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import stamp
from benchmarks.recipes.arms import MEASURED_TOKENS, SEEDS, Arm, arms, longer
from benchmarks.recipes.probe import probe, training_seconds
from benchmarks.recipes.runs import Runs
from benchmarks.recipes.tables import comparisons, table
from xarch_kd.files import write_text

# Seconds of a run besides its training (loading the teacher, saving, measuring), for the estimate of `--plan` only.
AROUND: Final = 32.0
# Arms that also run as long as the dearest arm they are compared with; of the hybrids', those from attention.
CHEAPER: Final = {
    "fresh-logits": ("fresh-uniform", "fresh-cka", "fresh-monotone"),
    "replaced-4-attention-output": ("replaced-4-attention-both",),
    "replaced-15-attention-output": ("replaced-15-attention-both",),
}


def run_strategies(
    folder: Path, output: Path, *, seeds: Sequence[int] = SEEDS, workers: int = 1, only_plan: bool = False
) -> None:
    """Run what is missing and write the results and their table; with `only_plan` print the missing runs."""
    runs = Runs(folder)
    if only_plan:
        print(planned(_kept_probe(folder), seeds))
        return
    steps = _kept_probe(folder) or _measured_probe(folder)
    writing = threading.Lock()
    found: list[dict[str, Any]] = []

    def one(arm: Arm, seed: int) -> None:
        figures = runs.figures(arm, seed)
        with writing:
            found.append(figures)
            _write(output, _result(arms_with_longer(steps, preparations(found)), steps, found))
            print(f"{arm.name}, seed {seed}: gap {figures['gap']:+.4f}, {figures['wall_seconds']} s", flush=True)

    def all_of(chosen: Sequence[Arm], seed: int) -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, chosen, [seed] * len(chosen)))

    for seed in seeds:
        all_of(arms(), seed)
    # What preparing takes is known from the first seed, and the same for all.
    first = [figures for figures in found if figures["seed"] == seeds[0]]
    for further in arms_with_longer(steps, preparations(first))[len(arms()) :]:
        for seed in seeds:
            all_of([further], seed)
    print(output.with_suffix(".md").read_text(encoding="utf-8"))


def rewrite(output: Path) -> None:
    """Rewrite the comparisons and the table of stored results without measuring anything."""
    _write(output, json.loads(output.read_text(encoding="utf-8")))


def _write(output: Path, result: dict[str, Any]) -> None:
    write_text(output, json.dumps({**result, "comparisons": comparisons(result)}, indent=2) + "\n")
    write_text(output.with_suffix(".md"), table(result))


def arm_seconds(arm: Arm, steps: Mapping[str, Sequence[dict[str, float]]], prepared: Mapping[str, float]) -> float:
    """Return the seconds of an arm: its calibration, the teacher's passes and the steps."""
    return training_seconds(arm.mapping, steps[arm.costs_like]) + prepared.get(arm.name, 0.0)


def preparations(figures: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return by arm the seconds of calibration and fitting in the run of its first seed."""
    first = min((row["seed"] for row in figures), default=0)
    return {row["arm"]: row["prepared_seconds"] for row in figures if row["seed"] == first}


def arms_with_longer(steps: Mapping[str, Sequence[dict[str, float]]], prepared: Mapping[str, float]) -> tuple[Arm, ...]:
    """Return all arms: those of equal tokens, then the cheaper ones in the wall time of their dearest comparison."""
    known = {arm.name: arm for arm in arms()}
    further = []
    for name, dearer in CHEAPER.items():
        seconds = {other: arm_seconds(known[other], steps, prepared) for other in dearer}
        dearest = max(seconds, key=lambda other: seconds[other])
        factor = seconds[dearest] / arm_seconds(known[name], steps, prepared)
        further.append(longer(known[name], max(1.0, factor), dearest))
    return (*known.values(), *further)


def planned(steps: Mapping[str, Sequence[dict[str, float]]] | None, seeds: Sequence[int]) -> str:
    """Return the runs as text, with their estimated minutes once steps were timed."""
    if steps is None:
        lines = [f"{arm.name}: {len(seeds)} runs" for arm in arms()]
        return "\n".join([*lines, *(f"{name}-as-long: {len(seeds)} runs" for name in CHEAPER), "no probe yet"])
    every = arms_with_longer(steps, {})
    minutes = {arm.name: len(seeds) * (arm_seconds(arm, steps, {}) + AROUND) / 60 for arm in every}
    lines = [f"{name}: {len(seeds)} runs, {value:.1f} minutes" for name, value in minutes.items()]
    return "\n".join([*lines, f"in all {sum(minutes.values()):.0f} minutes on one core"])


def _result(every: Sequence[Arm], steps: Any, figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    prepared = preparations(figures)
    return {
        "environment": stamp(device="cpu", threads=1),
        "measured_tokens": MEASURED_TOKENS,
        "probe": steps,
        "arms": [
            {
                "name": arm.name,
                "group": arm.group,
                "title": arm.title,
                "references": list(arm.references),
                "as_long_as": arm.as_long_as,
                "seconds": round(arm_seconds(arm, steps, prepared), 1),
                "tokens": tokens_of(arm.mapping),
                "mapping": arm.mapping,
            }
            for arm in every
        ],
        "runs": sorted(figures, key=lambda row: (row["seed"], row["arm"])),
    }


def tokens_of(mapping: dict[str, Any]) -> int:
    """Return the number of tokens that a mapping file trains on, with repetitions."""
    data = mapping["data"]
    return sum(
        stage["steps"] * stage.get("batch_size", data["batch_size"]) * data["sequence_length"]
        for stage in mapping["stages"]
    )


def _kept_probe(folder: Path) -> dict[str, list[dict[str, float]]] | None:
    path = folder / "probe.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _measured_probe(folder: Path) -> dict[str, list[dict[str, float]]]:
    steps = probe(arms(), folder)
    write_text(folder / "probe.json", json.dumps(steps, indent=2) + "\n")
    return steps
