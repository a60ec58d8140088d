"""Processes of a test: a command on several ranks as users start it, and forks, which import nothing again."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def launch(ranks: int, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `python -m torch.distributed.run --nproc-per-node RANKS …` and return what it printed and its exit code.

    Each rank has one thread, as the launcher sets it.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


def forked(function: Callable[..., object], *arguments: Any, **environment: str) -> BaseProcess:
    """Start `function` in a fork of this process, with one thread and `environment` besides this process's.

    It has everything that is imported here, which takes a new interpreter most of its time.
    """

    def run() -> None:
        import torch
        from accelerate.state import AcceleratorState, GradientState

        os.environ.update(environment)
        # As in a process that is no test.
        warnings.resetwarnings()
        torch.set_num_threads(1)
        # What runs of this process have set: they were alone.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def in_a_fork(function: Callable[..., object], *arguments: Any, timeout: float = 240) -> None:
    """Run `function` in a fork, for what would change this process.

    Raises:
        AssertionError: It failed or did not end in `timeout` seconds.
    """
    process = forked(function, *arguments)
    process.join(timeout)
    code = process.exitcode
    process.kill()
    assert code == 0, f"exit code of the fork: {code}"


def on_ranks(ranks: int, function: Callable[..., object], *arguments: Any, timeout: float = 240) -> None:
    """Run `function` in forks that find each other as the processes of torch.distributed.run do.

    Raises:
        AssertionError: One of them failed or did not end in `timeout` seconds.
    """
    from torch._C._distributed_c10d import TCPStore

    # Owned by this process, as by the launcher, so that it outlives every rank.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    processes = [forked(function, *arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]
    try:
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, f"exit codes of the ranks: {codes}"
