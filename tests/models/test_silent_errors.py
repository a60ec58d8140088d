"""Silent errors between two checkpoints, besides fields that a class drops (`test_targets.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.loading.save import save_student
from xarch_kd.testing.tiny import VOCABULARY, tiny_model, tiny_tokenizer

STUDENTS = {
    "bamba": ("llama", "mamba2"),
    "granitemoehybrid": ("granite", "mamba2"),
    "qwen3_5": ("qwen3", "gated_delta"),
    "olmo_hybrid": ("olmo2", "gated_delta"),
    "in_place": ("smollm3", "gated_delta"),
}


def tokens() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def student_of(target: str, teacher: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return convert(teacher, mixer=STUDENTS[target][1], target=target, **options)


@pytest.mark.parametrize("target", STUDENTS)
@torch.no_grad()
def test_kept_attention_is_the_teachers_under_each_implementation_and_not_across_them(target: str) -> None:
    teacher = tiny_model(STUDENTS[target][0])
    student = student_of(target, teacher, keep_attention="all")
    logits: dict[str, Tensor] = {}
    for implementation in ("eager", "sdpa"):
        teacher.set_attn_implementation(implementation)
        student.set_attn_implementation(implementation)
        logits[implementation] = teacher(tokens(), use_cache=False).logits
        assert torch.equal(student(tokens(), use_cache=False).logits, logits[implementation])
    assert not torch.equal(logits["eager"], logits["sdpa"])


@pytest.mark.parametrize("target", STUDENTS)
def test_a_pad_row_that_holds_something_is_carried_over(target: str) -> None:
    # An embedding with a padding index is built with that row zero, and never trains it.
    teacher = tiny_model(STUDENTS[target][0], pad_token_id=5)
    student = student_of(target, teacher, replace=[1])
    carried, given = student.get_input_embeddings(), teacher.get_input_embeddings()
    assert isinstance(carried, torch.nn.Embedding) and isinstance(given, torch.nn.Embedding)
    assert carried.padding_idx == 5 and bool(given.weight[5].any())
    assert torch.equal(carried.weight[5], given.weight[5])


@pytest.mark.parametrize("target", STUDENTS)
def test_how_a_teacher_was_quantized_is_no_part_of_its_student(target: str, tmp_path: Path) -> None:
    teacher = tiny_model(STUDENTS[target][0])
    teacher.config.quantization_config = {"quant_method": "gguf", "bits": 4}
    student = student_of(target, teacher, replace=[1], check=False)
    assert not hasattr(student.config, "quantization_config")
    save_student(student, tiny_tokenizer(), tmp_path / "student")
    assert "quantization_config" not in (tmp_path / "student" / "config.json").read_text()


@pytest.mark.parametrize("target", STUDENTS)
def test_decays_are_stored_in_float32_and_rounded_only_by_who_asks_for_it(target: str, tmp_path: Path) -> None:
    student = student_of(target, tiny_model(STUDENTS[target][0]).bfloat16(), replace=[1], init="random")
    save_student(student, tiny_tokenizer(), tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    decays = {name: value for name, value in loaded.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    assert len(decays) == 2 and all(value.dtype == torch.float32 for value in decays.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in decays.values())
