"""Readers of run folders, for tests of the main job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def student_of(run: Path) -> dict[str, Tensor]:
    """Return the student's weights by name."""
    return load_file(run / "student" / "model.safetensors")


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Return True if two sets of weights are bitwise equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def events_of(run: Path) -> list[dict[str, Any]]:
    """Return the events of a run in order."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
