"""`xarch-kd doctor`: report what runs on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from typing import Annotated, Any

import typer

import xarch_kd
from xarch_kd._layout import folder

# Required distributions, and the optional ones: extra → distribution → module.
CORE = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "pydantic",
    "typer",
    "rich",
)
EXTRAS = {
    "gguf": {"gguf": "gguf"},
    "mamba": {"mamba-ssm": "mamba_ssm", "causal-conv1d": "causal_conv1d"},
    "bench": {"liger-kernel": "liger_kernel", "matplotlib": "matplotlib", "trl": "trl"},
}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Report what runs on this machine: versions, devices, optional packages, implementations of the operations."""
    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(lines(found)))


def examine() -> dict[str, Any]:
    """Return the findings as JSON-ready data: None for a package that is not installed, memory in bytes."""
    import torch

    cuda = torch.cuda.is_available()
    devices = [
        {"name": torch.cuda.get_device_name(index), "memory": torch.cuda.get_device_properties(index).total_memory}
        for index in range(torch.cuda.device_count() if cuda else 0)
    ]
    triton = version("triton")
    return {
        "xarch_kd": xarch_kd.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in (*CORE, "triton")},
        "processor": {"threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "devices": devices,
        "extras": {extra: {name: version(name) for name in parts} for extra, parts in EXTRAS.items()},
        "implementations": implementations(cuda=cuda, triton=triton),
        "servers": servers(),
        "mappings": str(folder("mappings")),
    }


def version(distribution: str) -> str | None:
    """Return the installed version of `distribution`, or None, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def servers() -> dict[str, dict[str, Any]]:
    """Return for each server the release that students were checked with or read about, and the one installed here."""
    from xarch_kd.models.serving import DISTRIBUTIONS, SERVERS, TESTED

    return {
        server: {
            "release": release,
            "tested": server in TESTED,
            "installed": next((number for name in DISTRIBUTIONS[server] if (number := version(name))), None),
        }
        for server, release in SERVERS.items()
    }


def implementations(*, cuda: bool, triton: str | None) -> dict[str, dict[str, Any]]:
    """Return for each implementation of the operations if it runs here and, if not, the reason."""
    kernels = sorted(path.stem for path in folder("kernels").glob("*.py") if not path.stem.startswith("_"))
    reasons = [
        reason
        for reason, holds in (
            ("triton is not installed", triton is None),
            ("no CUDA device was found", not cuda),
            ("this release has no fused kernels yet", not kernels),
        )
        if holds
    ]
    return {
        "reference": {"runs": True, "reason": None},
        "streaming": {"runs": True, "reason": None},
        "fused": {"runs": not reasons, "reason": "; ".join(reasons) or None, "kernels": kernels},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the findings as plain lines."""
    shown = [f"xarch-kd {found['xarch_kd']} on Python {found['python']}, {found['platform']}", ""]
    shown += [f"  {name:<14}{number or 'not installed'}" for name, number in found["packages"].items()]
    shown += [
        "",
        "Devices",
        f"  processor     {found['processor']['cores']} cores, {found['processor']['threads']} threads used",
    ]
    shown += [
        f"  cuda:{index:<9}{device['name']}, {device['memory'] / 2**30:.0f} GiB"
        for index, device in enumerate(found["devices"])
    ]
    shown += [] if found["devices"] else ["  no CUDA device"]
    shown += ["", "Implementations of the operations"]
    shown += [
        f"  {name:<14}{'runs' if state['runs'] else 'does not run: ' + state['reason']}"
        for name, state in found["implementations"].items()
    ]
    shown += ["", "Servers of students (xarch-kd plan names those that run yours)"]
    for name, state in found["servers"].items():
        basis = "checked with students (make serve-check)" if state["tested"] else "read in its source, not run"
        here = f"installed here: {state['installed']}" if state["installed"] else "not installed here"
        shown.append(f"  {name:<14}{state['release']}: {basis}; {here}")
    shown += ["", "Optional parts"]
    for extra, parts in found["extras"].items():
        missing = [name for name, number in parts.items() if number is None]
        present = ", ".join(f"{name} {number}" for name, number in parts.items() if number is not None)
        absent = f"missing {', '.join(missing)}: pip install 'xarch-kd[{extra}]'" if missing else ""
        shown.append(f"  {extra:<14}{'; '.join(part for part in (present, absent) if part)}")
    return shown
