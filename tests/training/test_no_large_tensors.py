"""A whole training step makes no tensor of time × time and none of tokens × vocabulary, forward or backward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.models.conversion.convert import convert
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.allocations import AllocationWatch, square_or_vocabulary
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer
from xarch_kd.training.aligner import Aligner

TIME = 2048
# The tokens' logits are then more than the chunks of logits that are held, and no multiple of TIME².
VOCABULARY = 20011
# The last token predicts nothing.
PREDICTIONS = TIME - 1
ALIGN: list[dict[str, Any]] = [
    {"name": "stream", "tap": "hidden", "layers": "same", "loss": {"kind": "normalised_mse"}},
    {"name": "map", "tap": "mixing", "layers": "same", "loss": {"kind": "mixing", "distance": "cosine"}},
]


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=TIME, num_hidden_layers=2)


@pytest.fixture(scope="module")
def input_ids() -> Tensor:
    return torch.randint(2, VOCABULARY, (1, TIME), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def aligner_of(teacher: PreTrainedModel, tmp_path: Path) -> Callable[..., Aligner]:
    teacher.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    def make(*, impl: str = "auto", tokens: bool = True) -> Aligner:
        stage = {"name": "one", "steps": 1, "train": ["all"], "align": json.loads(json.dumps(ALIGN))}
        stage["align"][1]["loss"]["impl"] = impl
        mapping = {
            "version": 1,
            "teacher": {"model": str(tmp_path)},
            "student": {"convert": {"mixer": "mamba2", "replace": [1]}},
            "data": {"builtin": "python-docs", "sequence_length": TIME, "batch_size": 1},
            "stages": [{**stage, **({"tokens": {"divergence": "forward_kl"}} if tokens else {})}],
        }
        plan = make_plan(MappingFile.model_validate_json(json.dumps(mapping)))
        return Aligner(plan, teacher=teacher, student=convert(teacher, replace=[1], check=False))

    return make


def step(aligner: Aligner, input_ids: Tensor) -> AllocationWatch:
    with AllocationWatch(square_or_vocabulary(TIME, VOCABULARY, PREDICTIONS)) as watch:
        aligner(input_ids).loss.backward()
    return watch


def test_hidden_mixing_and_tokens_together(aligner_of: Callable[..., Aligner], input_ids: Tensor) -> None:
    aligner = aligner_of()
    watch = step(aligner, input_ids)
    # 4 pairs and the tokens each give gradients: the step was a whole one.
    assert len(aligner.stage.pairs) == 4
    assert all(parameter.grad is not None for parameter in aligner.student.parameters() if parameter.requires_grad)
    assert watch.seen > 1000
    assert watch.found == []


def test_projected_hidden_states_of_a_narrower_student(
    teacher: PreTrainedModel, input_ids: Tensor, tmp_path: Path
) -> None:
    # 6 heads, so that nothing the recurrence makes is a multiple of TIME² by chance.
    student = tiny_model("mamba2", vocab_size=VOCABULARY, hidden_size=48, num_heads=6, num_hidden_layers=2)
    for name, model in (("teacher", teacher), ("student", student)):
        model.config.save_pretrained(tmp_path / name)
    stage = {"name": "one", "steps": 1, "train": ["all"], "tokens": {"divergence": "forward_kl"}, "align": ALIGN[:1]}
    mapping = {
        "version": 1,
        "teacher": {"model": str(tmp_path / "teacher")},
        "student": {"config": str(tmp_path / "student")},
        "data": {"builtin": "python-docs", "sequence_length": TIME, "batch_size": 1},
        "stages": [stage],
    }
    plan = make_plan(MappingFile.model_validate_json(json.dumps(mapping)))
    aligner = Aligner(plan, teacher=teacher, student=student)
    assert len(aligner.projectors) == 2
    watch = step(aligner, input_ids)
    assert all(parameter.grad is not None for parameter in aligner.parameters())
    assert watch.seen > 1000
    assert watch.found == []


def test_the_watch_sees_a_dense_map_and_whole_logits(
    aligner_of: Callable[..., Aligner], input_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = step(aligner_of(impl="reference", tokens=False), input_ids)
    assert any(shape[-2:] == (TIME, TIME) for _, shape in dense.found)
    monkeypatch.setenv("XARCH_KD_IMPL", "reference")
    whole = step(aligner_of(impl="streaming"), input_ids)
    assert any(shape == (PREDICTIONS, VOCABULARY) for _, shape in whole.found)
