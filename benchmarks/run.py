"""Measurement of the operations and their peers, with the bounds that are met or missed.

    python -m benchmarks.run                                   every operation, on the CPU; writes benchmarks/results
    python -m benchmarks.run --op mixing_distance --gate       one of them; the exit code is 1 when a bound is missed
    python -m benchmarks.run --case 'jsd*' --contender streaming --against HEAD~5
    python -m benchmarks.run --tables                          tables and plots of the stored results, nothing measured

benchmarks/README.md describes the measures and derives each bound.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import tables
from benchmarks.case import Case
from benchmarks.cases import CASES, GROWTHS
from benchmarks.figures import grown, judge, record
from benchmarks.machine import roofline, stamp
from benchmarks.measure import HERE, Checkout, Settings, measure
from benchmarks.revision import checked_out, commit_of

RESULTS: Final = Path(__file__).resolve().parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen cases; return 1 if `--gate` is given and a bound is missed, exit with 2 for wrong usage."""
    parser = parser_of_arguments()
    asked = parser.parse_args(arguments)
    if asked.tables:
        tables.main([])
        return 0
    operations = asked.op or list(CASES)
    chosen = {operation: chosen_cases(operation, asked) for operation in operations}
    if not any(chosen.values()):
        parser.error("no case of these operations has that name and is meant for that device")
    if asked.output is not None and sum(map(bool, chosen.values())) != 1:
        parser.error("--output names one file: give one operation with --op")
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here")
    settings = Settings(
        device=asked.device,
        threads=asked.threads,
        repeats=1 if asked.quick else asked.repeats,
        quick=asked.quick,
        isolated=not asked.quick or asked.against is not None,
    )
    stamped = stamp(device=asked.device, threads=asked.threads)
    results = []
    with ExitStack() as stack:
        checkouts: tuple[Checkout, ...] = (HERE,)
        if not settings.isolated:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(settings.threads)
        if asked.against is not None:
            try:
                stamped["against"] = commit_of(asked.against)
                checkouts = (HERE, stack.enter_context(checked_out(asked.against)))
            except ValueError as error:
                parser.error(str(error))
        for operation, cases in chosen.items():
            if cases:
                results.append(measure_operation(operation, cases, settings, asked, stamped, checkouts))
                write(results[-1], where(operation, asked))
    missed = any(bound["met"] is False for result in results for bound in every_bound(result))
    return int(asked.gate and missed)


def parser_of_arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=list(CASES), help="an operation; may be given again")
    parser.add_argument("--case", action="append", help="a pattern of case names; may be given again")
    parser.add_argument("--contender", action="append", help="a pattern of contenders, beside the baseline")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--against", metavar="GITREF", help="measure our contenders at this revision too")
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: a smoke run, no figures")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--gate", action="store_true", help="exit code 1 when a bound is missed")
    parser.add_argument("--tables", action="store_true", help="only write tables and plots of the stored results")
    return parser


def available_threads() -> int:
    """Return OMP_NUM_THREADS if set, else the number of processors that this process may use."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def chosen_cases(operation: str, asked: argparse.Namespace) -> list[Case]:
    """Return the chosen cases of an operation for the device; a smoke run includes those of other devices."""
    patterns = asked.case or ["*"]
    return [
        case
        for case in CASES[operation]
        if (case.device == asked.device or asked.quick) and any(fnmatch.fnmatch(case.name, one) for one in patterns)
    ]


def measure_operation(
    operation: str,
    cases: list[Case],
    settings: Settings,
    asked: argparse.Namespace,
    stamped: dict[str, Any],
    checkouts: tuple[Checkout, ...],
) -> dict[str, Any]:
    """Return the stamped result of an operation, and print each case when it is done."""
    results = []
    for case in cases:
        names = [
            name
            for name in case.contenders
            if name == case.baseline or any(fnmatch.fnmatch(name, one) for one in asked.contender or ["*"])
        ]
        found, rates = measure(case, names, settings, checkouts)
        sizes = {**case.sizes, **(case.quick if settings.quick else {})}
        result = record(case, sizes, found, roofline(rates, device=settings.device, dtype=case.dtype))
        result["bounds"] = [] if settings.quick else judge(case.bounds, found, result)
        results.append(result)
        print(tables.case_table(result), flush=True)
    growths = [] if settings.quick else [grown(one, results) for one in GROWTHS[operation]]
    growths = [one for one in growths if any(result["group"] == one["group"] for result in results)]
    if growths:
        print(tables.growth_table(growths))
    kept = {"device": settings.device, "repeats": settings.repeats, "quick": settings.quick}
    return {"operation": operation, "stamp": stamped, "settings": kept, "cases": results, "growths": growths}


def every_bound(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the bounds of all cases and groups of a result."""
    return [*(bound for case in result["cases"] for bound in case["bounds"]), *result["growths"]]


def where(operation: str, asked: argparse.Namespace) -> Path | None:
    """Return the file of a result. Part of the cases, or a smoke run, is stored only with `--output`."""
    if asked.output is not None:
        return asked.output
    if asked.quick or asked.case or asked.contender or asked.against:
        return None
    return RESULTS / f"{operation}-{asked.device}.json"


def write(result: dict[str, Any], path: Path | None) -> None:
    """Write a result with its table and plots."""
    if path is None:
        print("Not stored: give --output to store a part, a comparison or a smoke run.")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    tables.render(path)


if __name__ == "__main__":
    sys.exit(main())
