"""Processes of one run: rank 0 owns the run folder and the console; the others wait for it, load and train.

Started by `python -m torch.distributed.run --nproc-per-node N -m xarch_kd train …`, which sets RANK, LOCAL_RANK and
WORLD_SIZE. Without these there is one process, and nothing here costs anything.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.distributed.rendezvous import rendezvous

from xarch_kd.errors import ProcessError, UsageError, XarchError

# Rank 0 calibrates, saves and measures while the others wait. A rank that is not back after this long is lost.
LONGEST_WAIT: Final = timedelta(hours=2)
# Interval at which a waiting rank checks for the failure of another.
POLL: Final = timedelta(seconds=1)
FAILURE: Final = "failure"
SHOWN_DIGITS: Final = 12

# A second process group of one launch must not read the addresses that the first left in the launcher's store.
_groups = itertools.count()

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the run. The default is a run of one process.

    Every method that talks to the other ranks must be called on all of them, in the same order. Each raises
    ProcessError when another rank has failed, with that rank's message, or does not answer within `LONGEST_WAIT`.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    _group: Any = None
    _store: Any = None
    _longest_wait: timedelta = LONGEST_WAIT
    _meetings: Iterator[int] = field(default_factory=itertools.count, compare=False)

    @property
    def is_main(self) -> bool:
        """True on the rank that writes and prints."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Return this rank's own device of that kind, e.g. `cuda:1` on local rank 1 of several."""
        if device.type != "cuda" or self.world_size == 1 or device.index is not None:
            return device
        return torch.device("cuda", self.local_rank)

    def gather(self, value: Value) -> list[Value]:
        """Return the value of every rank, in the order of ranks. Values are pickled: plain numbers and text."""
        if self.world_size == 1:
            return [value]
        self._wait_for_all()
        found: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(found, value, group=self._group)
        except RuntimeError as error:
            raise self._lost() from error
        return found

    def _wait_for_all(self) -> None:
        """Return when every rank is here. A rank that failed before it came here ends the wait within a second."""
        meeting = f"meeting-{next(self._meetings)}"
        try:
            if self._store.add(meeting, 1) == self.world_size:
                self._store.set(f"{meeting}-complete", "")
            until = time.monotonic() + self._longest_wait.total_seconds()
            while True:
                try:
                    self._store.wait([f"{meeting}-complete"], POLL)
                    return
                except dist.DistStoreError as error:
                    if self._failure() is not None or time.monotonic() > until:
                        raise self._lost() from error
        except dist.DistNetworkError as error:
            raise self._lost() from error

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is true on at least one rank."""
        return any(self.gather(flag))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def from_main(self, compute: Callable[[], Value]) -> Value:
        """Return what `compute` returns on rank 0, where alone it is called."""
        return self.gather(compute() if self.is_main else None)[0]  # type: ignore[return-value]  # rank 0 computed it

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the others, which find the files that rank 0 wrote.

        The run folder must be on a file system that all ranks see.
        """
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def check_same(self, fingerprints: Mapping[str, str]) -> None:
        """Raise UsageError, with every rank's fingerprint, unless all ranks have the same ones, by what they are of."""
        found = self.gather(dict(fingerprints))
        for name, own in found[0].items():
            if any(other[name] != own for other in found):
                raise UsageError(
                    f"the processes of this run differ in their {name}",
                    found=", ".join(f"rank {rank}: {other[name][:SHOWN_DIGITS]}" for rank, other in enumerate(found)),
                    allowed="the same on every rank",
                    fix="give every machine the same files, then start all processes again",
                )

    def _lost(self) -> ProcessError:
        """Return the error for ranks that do not answer: with the message of the one that failed, if it left any."""
        return self._failure() or ProcessError(
            "another process of this run ended without a message, or does not answer",
            found=f"seen by rank {self.rank} of {self.world_size}",
            fix="look at the other processes' output (e.g. out of memory), then run again with --resume",
        )

    def _failure(self) -> ProcessError | None:
        try:
            if self._store is None or not self._store.check([FAILURE]):
                return None
            rank, _, message = self._store.get(FAILURE).decode().partition(" ")
        except RuntimeError:  # the store was in a process that ended
            return None
        if int(rank) == self.rank:
            return None
        return ProcessError(
            f"rank {rank} of this run failed: {message}", fix="see its message, then run again with --resume"
        )

    def _report_failure(self, error: BaseException) -> None:
        """Leave this rank's message where the others find it; the first failure stays."""
        text = str(error) if isinstance(error, XarchError) else f"{type(error).__name__}: {error}"
        try:
            self._store.compare_set(FAILURE, "", f"{self.rank} {text}")
        except RuntimeError:  # the store's process has ended, so there is no reader
            return


@contextmanager
def joined_processes(device: torch.device, *, longest_wait: timedelta = LONGEST_WAIT) -> Iterator[Processes]:
    """Join the processes that the launcher started, for the length of the block.

    An error in the block on one rank ends the block on all: a rank that waits for another raises ProcessError with the
    message of the one that failed. A process group that exists already is used, and left to its owner.

    Raises:
        ProcessError: another rank failed, or does not answer.
    """
    began = not dist.is_initialized()
    if began and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    number = next(_groups)
    if began:
        _begin_group(device, longest_wait, number)
    processes = Processes(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        # Objects and flags go through the CPU, so that they cost no wait for an accelerator.
        _group=dist.new_group(backend="gloo", timeout=longest_wait),
        _store=PrefixStore(f"run-{number}", _get_default_store()),
        _longest_wait=longest_wait,
    )
    try:
        yield processes
        processes.barrier()
    except ProcessError:
        raise
    except BaseException as error:
        # A collective of the training step fails as RuntimeError when the rank at its other end has left.
        other = processes._failure() if isinstance(error, RuntimeError) else None
        if other is not None:
            raise other from error
        processes._report_failure(error)
        raise
    finally:
        if began:
            dist.destroy_process_group()


def _begin_group(device: torch.device, longest_wait: timedelta, number: int) -> None:
    store, rank, world_size = next(iter(rendezvous("env://")))
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"group-{number}", store),
        rank=rank,
        world_size=world_size,
        timeout=longest_wait,
    )
