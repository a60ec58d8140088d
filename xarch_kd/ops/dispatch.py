"""Which implementation of an operation runs, and why."""

from __future__ import annotations

import os
from typing import Final

from xarch_kd.errors import UsageError, suggest

ENVIRONMENT: Final = "XARCH_KD_IMPL"
OPERATIONS: Final = ("linear_divergence", "projected_distance")
UNAVAILABLE: Final = {"fused": "this version ships no fused kernel for it"}
AVAILABLE: Final = {
    "reference": "dense and differentiated by autograd: the specification, for tests and small inputs",
    "streaming": "chunked, with gradients in closed form: runs on any device",
}


def choose(operation: str, impl: str = "auto") -> str:
    """Return the implementation of `operation` that runs when `impl` is asked for.

    `auto` takes the one named by the environment variable `XARCH_KD_IMPL`, else `streaming`.

    Raises:
        UsageError: the operation or implementation is unknown, or the implementation cannot run.
    """
    if operation not in OPERATIONS:
        raise UsageError(
            f"There is no such operation.{suggest(operation, OPERATIONS)}",
            asked=operation,
            allowed=" | ".join(OPERATIONS),
        )
    named = (os.environ.get(ENVIRONMENT) or "auto") if impl == "auto" else impl
    if named == "auto":
        return "streaming"
    if named in AVAILABLE:
        return named
    allowed = " | ".join(("auto", *AVAILABLE))
    if named in UNAVAILABLE:
        raise UsageError(f"{operation} cannot run as '{named}': {UNAVAILABLE[named]}.", asked=named, allowed=allowed)
    raise UsageError(
        f"{operation} has no such implementation.{suggest(named, AVAILABLE)}", asked=named, allowed=allowed
    )


def explain(operation: str, impl: str = "auto") -> str:
    """Say in a few lines which implementation of `operation` runs for `impl`, and what speaks for and against each."""
    chosen = choose(operation, impl)
    lines = [f"{operation}: impl={impl!r} runs '{chosen}'"]
    lines += [f"  {name}: {reason}" for name, reason in AVAILABLE.items()]
    lines += [f"  {name}: cannot run, {reason}" for name, reason in UNAVAILABLE.items()]
    return "\n".join(lines)
