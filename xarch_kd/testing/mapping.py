"""Stages of tiny mapping files and text for them, for tests of the main job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind.\n\n"

MIXER_STAGE: dict[str, Any] = {
    "name": "mixers",
    "steps": 4,
    "batches": 3,
    "train": ["mixers"],
    "inputs": "teacher",
    "align": [{"name": "mixer-output", "tap": "mixer_output", "layers": "replaced", "loss": {"kind": "relative_mse"}}],
    "optimizer": {"lr": 1e-2},
}
LOGIT_STAGE: dict[str, Any] = {
    "name": "logits",
    "steps": 3,
    "train": ["mixers"],
    "tokens": {"divergence": "forward_kl", "cross_entropy": 0.1},
    "optimizer": {"lr": 1e-3},
}

Write = Callable[..., Path]

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
  suites: [likelihood, long_range, speed]
  also: [{builtin: licences}]
"""
