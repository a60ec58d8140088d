from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.planning.cost import Rates
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.mapping import GOOD
from xarch_kd.testing.tiny import tiny_config


@pytest.fixture(scope="session")
def good() -> str:
    """A mapping file with no fault; tests replace one line of it."""
    return GOOD


@pytest.fixture(scope="session")
def rates() -> Rates:
    """Made-up rates, so that times are the same everywhere."""
    return Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., str]:
    """Writes the config of a tiny model of a type into a folder and returns the folder's path."""

    def write(model_type: str, **overrides: Any) -> str:
        folder = tmp_path / f"{model_type}-{len(list(tmp_path.iterdir()))}"
        tiny_config(model_type, **overrides).save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture
def plan_of(tmp_path: Path, rates: Rates) -> Callable[[str], Plan]:
    """Writes a mapping file's text and returns its plan, at made-up rates."""

    def plan(text: str) -> Plan:
        path = tmp_path / "map.yaml"
        path.write_text(text, encoding="utf-8")
        return make_plan(path, rates=rates)

    return plan
