"""A whole training step makes no tensor of time × time and none of tokens × vocabulary, forward or backward."""

from __future__ import annotations

import json
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
ALIGN: list[dict[str, Any]] = [
    {"name": "stream", "tap": "hidden", "layers": "same", "loss": {"kind": "normalised_mse"}},
    {"name": "map", "tap": "mixing", "layers": "same", "loss": {"kind": "mixing", "distance": "cosine"}},
]


def teacher_of(time: int, vocabulary: int) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=vocabulary, max_position_embeddings=time, num_hidden_layers=2)


def tokens_of(time: int, vocabulary: int) -> Tensor:
    return torch.randint(2, vocabulary, (1, time), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return teacher_of(TIME, VOCABULARY)


def aligner_of(teacher: PreTrainedModel, folder: Path, *, impl: str = "auto", tokens: bool = True) -> Aligner:
    teacher.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    stage = {"name": "one", "steps": 1, "train": ["all"], "align": json.loads(json.dumps(ALIGN))}
    stage["align"][1]["loss"]["impl"] = impl
    length = teacher.config.max_position_embeddings
    mapping = {
        "version": 1,
        "teacher": {"model": str(folder)},
        "student": {"convert": {"mixer": "mamba2", "replace": [1]}},
        "data": {"builtin": "python-docs", "sequence_length": length, "batch_size": 1},
        "stages": [{**stage, **({"tokens": {"divergence": "forward_kl"}} if tokens else {})}],
    }
    plan = make_plan(MappingFile.model_validate_json(json.dumps(mapping)))
    return Aligner(plan, teacher=teacher, student=convert(teacher, replace=[1], check=False))


def step(aligner: Aligner, input_ids: Tensor, vocabulary: int = VOCABULARY) -> AllocationWatch:
    time = input_ids.shape[1]
    # The last token predicts nothing.
    with AllocationWatch(square_or_vocabulary(time, vocabulary, time - 1)) as watch:
        aligner(input_ids).loss.backward()
    return watch


def test_hidden_mixing_and_tokens_together(teacher: PreTrainedModel, tmp_path: Path) -> None:
    aligner = aligner_of(teacher, tmp_path)
    watch = step(aligner, tokens_of(TIME, VOCABULARY))
    # 4 pairs and the tokens each give gradients: the step was a whole one.
    assert len(aligner.stage.pairs) == 4
    assert all(parameter.grad is not None for parameter in aligner.student.parameters() if parameter.requires_grad)
    assert watch.seen > 1000
    assert watch.found == []


def test_projected_hidden_states_of_a_narrower_student(teacher: PreTrainedModel, tmp_path: Path) -> None:
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
    watch = step(aligner, tokens_of(TIME, VOCABULARY))
    assert all(parameter.grad is not None for parameter in aligner.parameters())
    assert watch.seen > 1000
    assert watch.found == []


def test_the_watch_sees_a_dense_map_and_whole_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time, vocabulary = 211, 1009
    teacher, input_ids = teacher_of(time, vocabulary), tokens_of(time, vocabulary)
    dense = step(aligner_of(teacher, tmp_path, impl="reference", tokens=False), input_ids, vocabulary)
    assert any(shape[-2:] == (time, time) for _, shape in dense.found)
    monkeypatch.setenv("XARCH_KD_IMPL", "reference")
    whole = step(aligner_of(teacher, tmp_path, impl="streaming"), input_ids, vocabulary)
    assert any(shape == (time - 1, vocabulary) for _, shape in whole.found)
