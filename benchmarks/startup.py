"""Startup times of `import xarch_kd`, `xarch-kd --help` and `xarch-kd plan`: medians over fresh interpreters.

Prints a table with the bounds on the medians, writes `benchmarks/results/startup.json` and returns 1 if a bound is
missed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "startup.json"
DEMO = Path(__file__).resolve().parent.parent / "mappings" / "smollm2-135m--mamba2-hybrid.yaml"
REPEATS = 9

# Case → the interpreter's arguments and the bound in seconds. An empty interpreter is measured for comparison.
CASES: dict[str, tuple[list[str], float]] = {
    "python -c pass": (["-c", "pass"], float("inf")),
    "import xarch_kd": (["-c", "import xarch_kd"], 0.3),
    "xarch-kd --help": (["-c", "import sys; from xarch_kd.cli.app import main; sys.exit(main(['--help']))"], 0.6),
    "xarch-kd plan": (["-m", "xarch_kd", "plan", str(DEMO)], 3.5),
    "xarch-kd --version": (["-c", "import sys; from xarch_kd.cli.app import main; sys.exit(main(['--version']))"], 0.6),
}


def seconds(arguments: list[str]) -> list[float]:
    """Return the wall time of each of `REPEATS` fresh interpreters, after one that fills the file cache."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> int:
    """Measure every case and return 0 if all bounds are met."""
    rows = {}
    for name, (arguments, bound) in CASES.items():
        times = seconds(arguments)
        median = statistics.median(times)
        rows[name] = {
            "median": round(median, 4),
            "slowest": round(max(times), 4),
            "bound": bound if bound < 1e9 else None,
        }
        print(f"{name:<20} median {median:.3f} s   slowest {max(times):.3f} s   bound {bound:.1f} s")
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"unit": "seconds", "repeats": REPEATS, **machine, "cases": rows}, indent=2) + "\n")
    return int(any(row["bound"] is not None and row["median"] > row["bound"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
