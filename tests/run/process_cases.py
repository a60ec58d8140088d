"""Cases of tests/run/test_processes.py, run on two ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from xarch_kd.errors import DataError
from xarch_kd.run.processes import Processes, joined_processes


def exchange(processes: Processes, folder: Path) -> object:
    """Every way in which ranks exchange values."""
    with processes.main_first():
        marker = folder / "written-by-rank-0"
        found_it = marker.exists()
        if processes.is_main:
            time.sleep(0.2)
            marker.write_text("x")
    return {
        "gather": processes.gather(f"rank {processes.rank}"),
        "from_main": processes.from_main(lambda: processes.rank + 10),
        "any": [processes.any_rank(processes.rank == 1), processes.any_rank(False)],
        "found": found_it,
        "device": str(processes.device(torch.device("cuda"))),
    }


def different_data(processes: Processes, folder: Path) -> object:
    """Ranks that read different data and the same mapping file."""
    processes.check_same({"mapping file": "a" * 64, "data": str(processes.rank) * 64})
    return "accepted"


def one_fails(processes: Processes, folder: Path) -> object:
    """Rank 1 fails while rank 0 waits for it."""
    if processes.rank == 1:
        raise DataError("the text is too short", found="3 tokens")
    processes.barrier()
    return "went on"


def one_fails_in_a_step(processes: Processes, folder: Path) -> object:
    """Rank 1 fails while rank 0 is in a collective of the training step."""
    if processes.rank == 1:
        raise KeyError("a bug")
    dist.all_reduce(torch.ones(3))
    return "went on"


def one_hangs(processes: Processes, folder: Path) -> object:
    """Rank 1 does not come."""
    if processes.rank == 1:
        time.sleep(4)
    processes.barrier()
    return "went on"


CASES: tuple[Callable[[Processes, Path], object], ...] = (
    exchange,
    different_data,
    one_fails,
    one_fails_in_a_step,
    one_hangs,
)


def main(folder: Path) -> None:
    """Run every case and write what came of it, by name, into a file of this rank."""
    results: dict[str, object] = {}
    rank = None
    for case in CASES:
        began = time.perf_counter()
        wait = timedelta(seconds=2 if case is one_hangs else 40)
        try:
            with joined_processes(torch.device("cpu"), longest_wait=wait) as processes:
                rank = processes.rank
                results[case.__name__] = case(processes, folder)
        except Exception as error:
            results[case.__name__] = f"{type(error).__name__}: {error}"
        results[f"{case.__name__} seconds"] = time.perf_counter() - began
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))
