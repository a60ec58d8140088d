"""Measurement of a case: contenders in processes of their own, one after another, round by round."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, Self

from benchmarks.case import Case
from benchmarks.machine import ROOT, Machine
from benchmarks.session import Session, one_line

THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
MACHINE: Final = "machine"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run. `patience`: seconds without an answer after which a contender is dropped."""

    device: str = "cpu"
    threads: int = 1
    repeats: int = 5
    quick: bool = False
    isolated: bool = True
    patience: float = 900.0


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """A checkout to measure: the suffix of its contenders' names, its root, and the import path of its workers."""

    suffix: str = ""
    root: Path = ROOT
    path: tuple[Path, ...] = (ROOT,)


HERE: Final = Checkout()


@dataclass
class Found:
    """Measurements of one contender, or the reason why it has none."""

    missing: str | None = None
    memory: dict[str, Any] | None = None
    seconds: list[float] = field(default_factory=list)
    errors: dict[str, Any] | None = None


class Worker(Protocol):
    """A worker that runs methods of `Session` or `Machine` by name."""

    def begin(self) -> Any: ...

    def ask(self, name: str) -> Any: ...

    def close(self) -> None: ...


class Local:
    """A contender in this process, for smoke runs."""

    def __init__(self, asked: dict[str, Any], case: Case) -> None:
        self.asked, self.case = asked, case
        self.subject: Any = None

    def begin(self) -> Any:
        """Prepare the contender and return under `missing` the reason why it cannot be measured, or None."""
        options = {"device": self.asked["device"], "quick": self.asked["quick"]}
        if MACHINE in self.asked:
            self.subject = Machine(dtype=self.asked["dtype"], **options)
            return {"missing": None}
        self.subject = Session(self.case, self.asked["contender"], **options)
        try:
            return {"missing": self.subject.prepare()}
        except Exception as error:
            return {"failed": one_line(error)}

    def ask(self, name: str) -> Any:
        """Return the result of the method `name`."""
        try:
            return getattr(self.subject, name)()
        except Exception as error:
            return {"failed": one_line(error)}

    def close(self) -> None:
        """Drop the contender and its inputs."""
        self.subject = None


class Remote:
    """A contender in a process of its own."""

    def __init__(self, asked: dict[str, Any], checkout: Checkout, patience: float) -> None:
        self.asked, self.patience = asked, patience
        threads = dict.fromkeys(THREAD_VARIABLES, str(asked["threads"]))
        path = os.pathsep.join(map(str, checkout.path))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.worker"],
            cwd=checkout.path[0],
            env={**os.environ, **threads, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def begin(self) -> Any:
        """Prepare the contender there and return under `missing` the reason why it cannot be measured, or None."""
        return self._exchange(self.asked)

    def ask(self, name: str) -> Any:
        """Return the result of the method `name` there."""
        return self._exchange({"do": name})

    def _exchange(self, message: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], self.patience)
            line = self.process.stdout.readline() if ready else None
        except BrokenPipeError:
            line = ""
        if line is None:
            self.close()
            return {"failed": f"no answer within {self.patience:.0f} s"}
        if not line:
            return {"failed": f"its process ended with code {self.process.wait()}"}
        return json.loads(line)["answer"]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Round:
    """Contenders of a case that are still measured, with the measurements of each."""

    def __init__(self, case: Case, names: list[str], settings: Settings, checkouts: tuple[Checkout, ...]) -> None:
        self.case, self.settings = case, settings
        self.found: dict[str, Found] = {}
        self.asked: dict[str, Worker] = {}
        for name in names:
            for checkout in checkouts if case.contenders[name].ours else checkouts[:1]:
                self._begin(name, checkout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.asked.values():
            one.close()

    def _begin(self, name: str, checkout: Checkout) -> None:
        key, settings = name + checkout.suffix, self.settings
        asked = {
            "operation": self.case.operation,
            "case": self.case.name,
            "contender": name,
            "root": str(checkout.root),
        }
        one = open_worker(asked, self.case, settings, checkout)
        self.found[key], self.asked[key] = Found(), one
        answer = self._kept(key, one.begin())
        if answer is not None and answer["missing"] is not None:
            self._drop(key, answer["missing"])

    def _kept(self, key: str, answer: Any) -> Any:
        """Return the answer, or drop a contender that failed and return None."""
        if isinstance(answer, dict) and "failed" in answer:
            self._drop(key, answer["failed"])
            return None
        return answer

    def _drop(self, key: str, reason: str) -> None:
        self.found[key].missing = reason
        self.asked.pop(key).close()

    def ask(self, name: str, *, backwards: bool = False) -> Iterator[tuple[str, Any]]:
        """Run the method `name` of each contender in turn and yield the contender's name and the result."""
        for key in sorted(self.asked, key=list(self.asked).index, reverse=backwards):
            answer = self._kept(key, self.asked[key].ask(name))
            if answer is not None:
                yield key, answer


def open_worker(asked: dict[str, Any], case: Case, settings: Settings, checkout: Checkout = HERE) -> Worker:
    """Return a worker for the request, in this process or in one of its own."""
    common = {"device": settings.device, "threads": settings.threads, "quick": settings.quick}
    if settings.isolated:
        return Remote({**asked, **common}, checkout, settings.patience)
    return Local({**asked, **common}, case)


def measure(
    case: Case, names: list[str], settings: Settings, checkouts: tuple[Checkout, ...] = (HERE,)
) -> tuple[dict[str, Found], list[dict[str, float]]]:
    """Return the measurements of each contender of `case`, and the rates of the machine in each round.

    Contenders of one round run one after another, every second round in reverse, so that a change of the machine's
    speed affects all of them.
    """
    machine = open_worker({MACHINE: True, "dtype": case.dtype}, case, settings)
    machine.begin()
    rates = []
    with Round(case, names, settings, checkouts) as round_:
        for key, answer in round_.ask("memory"):
            round_.found[key].memory = answer
        for number in range(settings.repeats):
            rates.append(machine.ask("rates"))
            for key, answer in round_.ask("seconds", backwards=number % 2 == 1):
                round_.found[key].seconds.append(answer)
        machine.close()
        for key, answer in round_.ask("errors"):
            round_.found[key].errors = answer
    return round_.found, rates
