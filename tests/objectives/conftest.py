"""A teacher of four blocks, narrower and shallower students, and aligners between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.objectives.stages import Build, plan_of
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer
from xarch_kd.training.aligner import Aligner


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    """A frozen Llama of four blocks."""
    return tiny_model("llama", num_hidden_layers=4).requires_grad_(False)


@pytest.fixture(scope="module")
def students() -> dict[str, PreTrainedModel]:
    """A narrower and shallower Mamba-2, and a Transformer with fewer heads."""
    return {
        "mamba2": tiny_model("mamba2", hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=2),
        "llama": tiny_model("llama", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16),
    }


@pytest.fixture(scope="module")
def folders(
    teacher: PreTrainedModel, students: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Each of them with its tokenizer, saved as a checkpoint."""
    found = {}
    for name, model in {"teacher": teacher, **students}.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tiny_tokenizer().save_pretrained(found[name])
    return found


@pytest.fixture
def build(folders: dict[str, Path], teacher: PreTrainedModel, students: dict[str, PreTrainedModel]) -> Build:
    """Build the aligner of one stage: `align` entries, and what else the stage has."""

    def built(*align: dict[str, Any], student: str = "mamba2", **stage: Any) -> Aligner:
        # A copy, because tests train it.
        model = type(students[student])(students[student].config).eval()
        model.load_state_dict(students[student].state_dict())
        plan = plan_of(folders, *align, student=student, **stage)
        return Aligner(plan, teacher=teacher, student=model)

    return built
