"""State of optimizer, scheduler, gradient scaler and random numbers as safetensors, without pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy
import torch
from torch import Tensor

from xarch_kd.errors import CheckpointError
from xarch_kd.files import read_tensors, write_tensors

OPTIMIZER_FILE: Final = "optimizer.safetensors"
SCHEDULER_FILE: Final = "scheduler.safetensors"
SCALER_FILE: Final = "scaler.safetensors"
# Key of the values beside the tensors in the metadata of a file.
TREE: Final = "tree"


def random_file(rank: int, ranks: int) -> str:
    """Return the name of the file with the random numbers of a rank."""
    return "random.safetensors" if ranks == 1 else f"random_{rank}.safetensors"


def write_tree(path: Path, value: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numpy arrays and plain values.

    Raises CheckpointError for other objects, and if the file cannot be written.

    >>> import torch, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.safetensors"
    >>> write_tree(path, {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.95), "foreach": None})
    >>> read_tree(path)
    {'state': {0: {'step': tensor(3.)}}, 'betas': (0.9, 0.95), 'foreach': None}
    """
    tensors: dict[str, Tensor] = {}
    tree = _encoded(value, tensors, path)
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # safetensors stores no two tensors of the same memory.
        if tensor.untyped_storage().data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    write_tensors(path, tensors, {TREE: json.dumps(tree)})


def read_tree(path: Path) -> Any:
    """Return what `write_tree` wrote. Raises CheckpointError for a file that is missing or damaged."""
    tensors, metadata = read_tensors(path)
    return _decoded(json.loads(metadata[TREE]), tensors)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all random numbers that a step may draw."""
    found = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Continue with the random numbers of a state."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _encoded(value: Any, tensors: dict[str, Tensor], path: Path) -> Any:
    """Return a value as JSON, each container as a pair of its kind and its entries; tensors are put into `tensors`."""
    if isinstance(value, Mapping):
        entries = [[_encoded(key, tensors, path), _encoded(entry, tensors, path)] for key, entry in value.items()]
        return ["dict", entries]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_encoded(entry, tensors, path) for entry in value]]
    if type(value) in (Tensor, torch.nn.Parameter) or isinstance(value, numpy.ndarray):
        name = str(len(tensors))
        is_array = isinstance(value, numpy.ndarray)
        tensors[name] = torch.from_numpy(value) if is_array else value.detach()
        return ["array" if is_array else "tensor", name]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    raise CheckpointError(
        f"the state of this optimizer cannot be stored in {path.name}",
        found=f"an object of {type(value).__module__}.{type(value).__qualname__}",
        allowed="tensors, numbers and text; other objects could only be stored by pickle, which can run code",
        fix="optimizer: {name: adamw}, or another one whose state is tensors",
    )


def _decoded(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, list):
        return node
    kind, content = node
    match kind:
        case "dict":
            return {_decoded(key, tensors): _decoded(entry, tensors) for key, entry in content}
        case "tensor":
            return tensors[content]
        case "array":
            return tensors[content].numpy()
        case _:
            entries = [_decoded(entry, tensors) for entry in content]
            return entries if kind == "list" else tuple(entries)
