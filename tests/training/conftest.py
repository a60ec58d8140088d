"""A tiny teacher, its folder, and tokens for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    """A frozen Llama."""
    return tiny_model("llama").requires_grad_(False)


@pytest.fixture(scope="module")
def teacher_folder(teacher: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It with its tokenizer, saved as a checkpoint."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def input_ids() -> Tensor:
    """Two rows of 16 tokens."""
    return torch.randint(2, 97, (2, 16), generator=torch.Generator().manual_seed(0))
