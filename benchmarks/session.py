"""One contender of one case in this process: prepared once, then measured for memory, seconds and errors."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.case import Case, Contender, Inputs, Run, Sizes
from benchmarks.memory import peak_can_be_set_back, peak_over
from benchmarks.peers import REQUIREMENTS

# A repeat lasts at least this many seconds, in as many calls as that takes.
SHORTEST_REPEAT: Final = 0.25
MOST_CALLS: Final = 100


def unsupported_reason(contender: Contender, sizes: Sizes, device: str) -> str | None:
    """Return the reason why the contender is not measured at these sizes on this device, or None."""
    for axis, largest in contender.largest.items():
        if sizes.get(axis, 0) > largest:
            return f"left out above {axis} = {largest}: too large or too slow"
    reason = next((reason for need in contender.needs if (reason := REQUIREMENTS[need](device))), None)
    return None if reason is None else without_paths(reason)


def one_line(error: BaseException) -> str:
    """Return the kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return without_paths(f"{type(error).__name__}: {lines[0] if lines else ''}")


def without_paths(text: str) -> str:
    """Return the first characters of a text without anything that looks like a path."""
    return re.sub(r"(?:/[\w.+-]+){2,}", "…", text)[:300]


def call(run: Run, inputs: Inputs) -> Tensor:
    """Compute the value and, if anything requires one, the gradients."""
    value = run(inputs)
    if value.requires_grad:
        value.backward()
    return value.detach()


def forget_gradients(inputs: Inputs) -> None:
    """Drop the gradients of the inputs."""
    for tensor in inputs.values():
        tensor.grad = None


class Session:
    """A contender with its inputs. `prepare` must be called first."""

    def __init__(self, case: Case, name: str, *, device: str, quick: bool = False) -> None:
        self.case = case
        self.contender = case.contenders[name]
        self.device = device
        self.sizes = {**case.sizes, **(case.quick if quick else {})}
        self.proxy = self.sizes if quick else {**case.sizes, **case.proxy}
        self.quick = quick
        self.shortest = 0.0 if quick else SHORTEST_REPEAT
        self.calls = 1
        self.first: dict[str, Any] | None = None

    def prepare(self) -> str | None:
        """Build the contender, draw the inputs and make a first call; return the reason if it cannot be measured."""
        if self.quick and "compiler" in self.contender.needs:
            return "left out of a smoke run: compiling takes longer than the rest of it"
        reason = unsupported_reason(self.contender, self.sizes, self.device)
        if reason is not None:
            return reason
        self.run = self.contender.make({**self.case.options, **self.sizes})
        self.inputs = self.case.draw(self.sizes, self.device)
        if self.device == "cpu" and not peak_can_be_set_back():
            self.first = self._peak()
        if self.case.warm and not self.quick:
            call(self.run, self.case.draw({**self.sizes, **self.case.warm}, self.device))
            return None
        self._timed(1)
        self.calls = min(MOST_CALLS, max(1, math.ceil(self.shortest / max(self._timed(1), 1e-6))))
        return None

    def memory(self) -> dict[str, Any]:
        """Return the peak of one call in bytes over the inputs, gradients included."""
        return self._peak() if self.first is None else self.first

    def seconds(self) -> float:
        """Return the seconds of one call, forward and backward, averaged over the calls of a repeat."""
        if self.device == "cuda":
            # Other contenders ran on the device in between.
            self._timed(1)
        taken = self._timed(self.calls)
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return taken

    def _peak(self) -> dict[str, Any]:
        forget_gradients(self.inputs)
        peak, method = peak_over(lambda: call(self.run, self.inputs), self.device)
        forget_gradients(self.inputs)
        return {"peak_bytes": peak, "method": method}

    def _timed(self, calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            forget_gradients(self.inputs)
            total += self._once(lambda: call(self.run, self.inputs))
        forget_gradients(self.inputs)
        return total / calls

    def _once(self, compute: Callable[[], object]) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        compute()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def errors(self) -> dict[str, Any] | None:
        """Return the relative errors of value and gradients against the dense computation in float64, if any."""
        if self.case.whole is not None:
            return None
        inputs = self.case.draw(self.proxy, self.device)
        exact = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()}
        truth = self.case.contenders[self.contender.truth or self.case.baseline].make(self.case.options)
        value, expected = call(self.run, inputs), call(truth, exact)
        gradients = {
            name: _distance(tensor.grad, exact[name].grad) for name, tensor in inputs.items() if tensor.requires_grad
        }
        return {"sizes": dict(self.proxy), "value": _distance(value, expected), "gradients": gradients}


def _distance(found: Tensor | None, expected: Tensor | None) -> float:
    """Return |found - expected| / |expected|; a missing gradient is 0."""
    if expected is None:
        return 0.0 if found is None else float(found.norm())
    difference = expected.double() - (0 if found is None else found.double())
    return float(difference.norm() / expected.double().norm().clamp_min(torch.finfo(torch.float64).tiny))
