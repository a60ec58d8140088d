"""A teacher whose norms are given another epsilon keeps its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.errors import ConversionError
from xarch_kd.models.conversion.check import logits_tolerance
from xarch_kd.models.conversion.epsilon import with_epsilon
from xarch_kd.testing.tiny import VOCABULARY, tiny_model

# Large enough to show against inputs of size 1.
OLD, NEW = 3e-2, 1e-5


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("phi3", {}),
        ("gemma", {}),
        ("granite", {}),
    ],
)
def test_the_logits_are_the_teachers(model_type: str, overrides: dict[str, Any], tied: bool) -> None:
    teacher = tiny_model(model_type, rms_norm_eps=OLD, tie_word_embeddings=tied, **overrides)
    moved = with_epsilon(teacher, NEW)
    expected = logits(teacher)
    tolerance = logits_tolerance(float(expected.abs().max()), 3, torch.float32)
    assert float((logits(moved) - expected).abs().max()) <= tolerance
    assert moved.config.to_dict()["rms_norm_eps"] == NEW
    assert (moved.get_parameter("lm_head.weight") is moved.get_input_embeddings().weight) == tied
    without = tiny_model(model_type, rms_norm_eps=NEW, tie_word_embeddings=tied, **overrides)
    assert float((logits(without) - expected).abs().max()) > 10 * tolerance


def test_the_teacher_stays_as_it_was() -> None:
    teacher = tiny_model("llama", rms_norm_eps=OLD)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with_epsilon(teacher, NEW)
    assert all(value.equal(before[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.to_dict()["rms_norm_eps"] == OLD


@pytest.mark.parametrize(("model_type", "found"), [("qwen3", "queries and keys"), ("olmo2", "after its sub-blocks")])
def test_norms_in_other_places_are_refused(model_type: str, found: str) -> None:
    with pytest.raises(ConversionError, match=found):
        with_epsilon(tiny_model(model_type), NEW)
