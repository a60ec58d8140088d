from __future__ import annotations

import pytest

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
