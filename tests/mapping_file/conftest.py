from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.mapping_file.estimate import Rates
from xarch_kd.mapping_file.plan import Plan
from xarch_kd.mapping_file.resolve import make_plan
from xarch_kd.testing.tiny import tiny_config

GOOD = """\
version: 1
teacher:
  model: ./teacher
  dtype: bfloat16
student:
  convert:
    mixer: mamba2
    keep_attention: every 2
data:
  builtin: python-docs
  sequence_length: 64
  batch_size: 2
seed: 0
stages:
  - name: mixers
    steps: 4
    train: [mixers]
    inputs: teacher
    align:
      - name: mixer-output
        tap: mixer_output
        layers: replaced
        loss: {kind: relative_mse, weight: 1.0}
    optimizer: {lr: 1e-2}
    cache: memory
  - name: logits
    steps: 2
    train: [mixers]
    tokens: {divergence: forward_kl}
evaluate:
  suites: [likelihood]
  also: [{builtin: licences}]
"""


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
