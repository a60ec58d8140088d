"""Conversion of a real teacher: SmolLM2-135M-Instruct."""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.loading.load import load_config, load_tokenizer, meta_model

REPLACED = [6, 13, 20, 27]


@pytest.fixture(scope="module")
def rows(smollm2_reference: str) -> Tensor:
    """Two rows of 96 tokens of Python's documentation."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "class"))
    return torch.tensor(load_tokenizer(smollm2_reference)(text)["input_ids"][:192]).view(2, 96)


@torch.no_grad()
def nll(model: PreTrainedModel, rows: Tensor) -> float:
    """Mean negative log-likelihood in nats per token."""
    logits = model(rows, use_cache=False).logits[:, :-1]
    return float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def test_loads_from_its_gguf_without_a_trace_of_quantization(smollm2: PreTrainedModel, smollm2_reference: str) -> None:
    assert smollm2.hf_quantizer is None
    assert not hasattr(smollm2.config, "quantization_config")
    assert {parameter.dtype for parameter in smollm2.parameters()} == {torch.float32}
    planned = meta_model(load_config(smollm2_reference))
    assert [name for name, _ in planned.named_parameters()] == [name for name, _ in smollm2.named_parameters()]
    assert sum(parameter.numel() for parameter in planned.parameters()) == 134_515_008


@torch.no_grad()
def test_with_all_attention_kept_the_logits_are_equal(smollm2: PreTrainedModel, rows: Tensor) -> None:
    student = convert(smollm2, keep_attention="all")
    assert torch.equal(student(rows[:1, :64]).logits, smollm2(rows[:1, :64]).logits)


def test_mixers_made_from_attention_start_nearer_to_the_teacher_than_no_mixer(
    smollm2: PreTrainedModel, rows: Tensor
) -> None:
    student = convert(smollm2, replace=REPLACED, check=False)
    teacher_nll, student_nll = nll(smollm2, rows), nll(student, rows)
    with torch.no_grad():
        for index in REPLACED:
            student.model.layers[index].mamba.out_proj.weight.zero_()
    without_nll = nll(student, rows)
    print(f"nats per token: teacher {teacher_nll:.3f}, student {student_nll:.3f}, without mixers {without_nll:.3f}")
    assert teacher_nll < student_nll < without_nll
    assert student_nll < teacher_nll + 0.5


def test_gated_delta_mixers_made_from_attention_start_nearer_to_the_teacher_than_no_mixer(
    smollm2: PreTrainedModel, rows: Tensor
) -> None:
    student = convert(smollm2, mixer="gated_delta", replace=REPLACED, check=False)
    teacher_nll, student_nll = nll(smollm2, rows), nll(student, rows)
    with torch.no_grad():
        for index in REPLACED:
            student.model.layers[index].linear_attn.out_proj.weight.zero_()
    without_nll = nll(student, rows)
    print(f"nats per token: teacher {teacher_nll:.3f}, student {student_nll:.3f}, without mixers {without_nll:.3f}")
    assert teacher_nll < student_nll < without_nll
    # Nothing is trained: at least a fifth of what the attention of four blocks gave is there at the start.
    assert student_nll - teacher_nll < 0.8 * (without_nll - teacher_nll)
