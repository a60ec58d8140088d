"""Selection of the implementation of an operation."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor

from xarch_kd.errors import UsageError, suggest

ENVIRONMENT: Final = "XARCH_KD_IMPL"
Impl = Literal["auto", "reference", "streaming", "fused"]
SimilarityImpl = Literal["auto", "reference", "streaming"]
MixingImpl = Literal["auto", "reference", "streaming", "fused", "panels", "sketch"]
# In the order in which `auto` takes them.
IMPLEMENTATIONS: Final = {
    "linear_divergence": ("fused", "streaming", "reference"),
    "mixing_distance": ("fused", "streaming", "panels", "sketch", "reference"),
    "projected_distance": ("fused", "streaming", "reference"),
    "similarity": ("streaming", "reference"),
}
DESCRIPTIONS: Final = {
    "fused": "Triton kernels: no large intermediate, on a GPU",
    "streaming": "chunked, with gradients in closed form: runs on any device",
    "panels": "exact, by applying the mixers to columns of the identity: any mixer, linear memory",
    "sketch": "estimated, by applying the mixers to random probes: any mixer, linear time and memory",
    "reference": "dense and differentiated by autograd: the specification, for tests and small inputs",
}
# Estimates and specifications run only if asked for by name; so do kernels in the interpreter, which is slow.
ASKED_FOR_ONLY: Final = ("sketch", "reference")
KERNEL_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
NONE_UNSUPPORTED: Final[Mapping[str, str]] = MappingProxyType({})


class Inquiry(str):
    """An `impl` for which `choose` raises an `Explanation` instead of returning an implementation."""


class Explanation(Exception):
    """Text of an inquiry's answer; it ends the call before anything is computed."""


def interpreted() -> bool:
    """Return True if Triton kernels run in its interpreter, on CPU tensors, as in tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def by_name_alone() -> tuple[str, ...]:
    """Return the implementations that `auto` skips although they can run."""
    return (*ASKED_FOR_ONLY, "fused") if interpreted() else ASKED_FOR_ONLY


def kernel_unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Return why Triton kernels cannot run on these tensors, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not interpreted():
            return f"Triton kernels need a GPU and the tensors are on the {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype not in KERNEL_DTYPES:
            return f"the kernels take float32, bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    return None


def choose(operation: str, impl: str = "auto", unsupported_reasons: Mapping[str, str] = NONE_UNSUPPORTED) -> str:
    """Return the implementation of `operation` that runs when `impl` is asked for.

    `unsupported_reasons` gives, by implementation, why it cannot run on these inputs. `auto` takes the one named by the
    environment variable `XARCH_KD_IMPL`, else the first that can run and is neither an estimate nor the specification.

    Raises:
        UsageError: the operation or implementation is unknown, or the implementation cannot run.
        Explanation: `impl` is an inquiry.
    """
    if isinstance(impl, Inquiry):
        raise Explanation(explain_choice(operation, str(impl), unsupported_reasons))
    if operation not in IMPLEMENTATIONS:
        raise UsageError(
            f"There is no such operation.{suggest(operation, IMPLEMENTATIONS)}",
            asked=operation,
            allowed=" | ".join(IMPLEMENTATIONS),
        )
    names = IMPLEMENTATIONS[operation]
    runnable = [name for name in names if name not in unsupported_reasons]
    named = (os.environ.get(ENVIRONMENT) or "auto") if impl == "auto" else impl
    if named == "auto":
        return next((name for name in runnable if name not in by_name_alone()), runnable[-1])
    allowed = " | ".join(("auto", *runnable))
    if named in unsupported_reasons and named in names:
        raise UsageError(
            f"{operation} cannot run as '{named}': {unsupported_reasons[named]}.", asked=named, allowed=allowed
        )
    if named not in names:
        raise UsageError(
            f"{operation} has no such implementation.{suggest(named, names)}", asked=named, allowed=allowed
        )
    return named


def explain_choice(
    operation: str, impl: str = "auto", unsupported_reasons: Mapping[str, str] = NONE_UNSUPPORTED
) -> str:
    """Return a few lines: the implementation that runs for `impl`, and what each is or why it cannot run.

    Raises:
        UsageError: as `choose` does.
    """
    lines = [f"{operation}: impl={impl!r} runs '{choose(operation, impl, unsupported_reasons)}'"]
    if impl == "auto" and os.environ.get(ENVIRONMENT):
        lines[0] += f", named by the environment variable {ENVIRONMENT}"
    for name in IMPLEMENTATIONS[operation]:
        note = " (only if asked for by name)" if name in by_name_alone() else ""
        lines.append(
            f"  {name}: "
            + (f"cannot run, {unsupported_reasons[name]}" if name in unsupported_reasons else DESCRIPTIONS[name] + note)
        )
    return "\n".join(lines)


def machine_unsupported_reasons() -> Mapping[str, str]:
    """Return the reason for each implementation that cannot run on this machine, whatever the inputs."""
    reason = kernel_unsupported_reason()
    if reason is None and not torch.cuda.is_available() and not interpreted():
        reason = "Triton kernels need a GPU and there is none"
    return NONE_UNSUPPORTED if reason is None else {"fused": reason}
