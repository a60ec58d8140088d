"""Two tables of recipes on a real teacher.

    python -m benchmarks.recipes [--runs runs/recipes] [--output benchmarks/results/recipes.json]
    python -m benchmarks.recipes --table strategies [--plan | --stored] [--workers 2] [--seeds 0 1 2]

The first compares the demo's recipe with a baseline (`demo`), the second layer maps and conversions (`strategies`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.recipes.arms import SEEDS
from benchmarks.recipes.demo import demo_table
from benchmarks.recipes.strategies import rewrite, run_strategies

# Table → folder of its runs, file of its results.
RESULTS = {"demo": ("recipes", "recipes.json"), "strategies": ("strategies", "strategies-cpu.json")}


def main() -> None:
    """Run what is missing, write the results and their table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=tuple(RESULTS), default="demo")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plan", action="store_true", help="strategies: print the runs with their estimated minutes")
    parser.add_argument("--stored", action="store_true", help="strategies: rewrite the table of the stored results")
    parser.add_argument("--workers", type=int, default=1, help="strategies: runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="strategies: seeds of the runs")
    arguments = parser.parse_args()
    runs = arguments.runs or Path("runs") / RESULTS[arguments.table][0]
    output = arguments.output or ROOT / "benchmarks" / "results" / RESULTS[arguments.table][1]
    if arguments.table == "demo":
        demo_table(runs, output)
    elif arguments.stored:
        rewrite(output)
    else:
        run_strategies(runs, output, seeds=arguments.seeds, workers=arguments.workers, only_plan=arguments.plan)


if __name__ == "__main__":
    main()
