"""The aligner as a module: masks, a teacher that is outside it, self-distillation, one's own loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.errors import UsageError
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.models.conversion.convert import convert
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.tiny import tiny_model
from xarch_kd.training.aligner import Aligner

TOKENS: dict[str, Any] = {"tokens": {"divergence": "forward_kl", "cross_entropy": 0.5}}
KINDS = ("mse", "relative_mse", "cosine", "normalised_mse", "huber", "l2")


def _hidden(kind: str, layers: str = "same") -> dict[str, Any]:
    return {"align": [{"name": "stream", "tap": "hidden", "layers": layers, "loss": {"kind": kind}}]}


def plan_of(folder: Path, *stages: dict[str, Any], **student: Any) -> Plan:
    named = [{"name": f"s{index}", "steps": 1, "train": ["all"], **stage} for index, stage in enumerate(stages)]
    mapping = {
        "version": 1,
        "teacher": {"model": str(folder)},
        "student": student or {"convert": {"mixer": "mamba2", "replace": [1]}},
        "data": {"builtin": "python-docs", "sequence_length": 16, "batch_size": 2},
        "stages": named,
    }
    # Through JSON, whose lists a strict model takes as tuples.
    return make_plan(MappingFile.model_validate_json(json.dumps(mapping)))


@pytest.fixture
def student(teacher: PreTrainedModel) -> PreTrainedModel:
    return convert(teacher, replace=[1])


def test_left_padded_rows_are_refused(
    teacher_folder: Path, teacher: PreTrainedModel, student: PreTrainedModel, input_ids: Tensor
) -> None:
    """Fused Mamba-2 kernels train without a mask, so that padding before the tokens would leak into them."""
    aligner = Aligner(plan_of(teacher_folder, _hidden("mse")), teacher=teacher, student=student)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    with pytest.raises(UsageError, match="padded on the left") as error:
        aligner(input_ids, mask)
    assert "right" in str(error.value.fix)
    # A row without a token is no left-padded one.
    mask[1] = 0
    aligner(input_ids, mask)
    aligner(input_ids, mask.flip(0).cummin(1).values)


@pytest.mark.parametrize("stage", [*(_hidden(kind) for kind in KINDS), {"tokens": {"divergence": "reverse_kl"}}])
def test_a_student_that_is_the_teacher_has_loss_and_gradient_zero(
    teacher_folder: Path, teacher: PreTrainedModel, input_ids: Tensor, stage: dict[str, Any]
) -> None:
    copy = tiny_model("llama")
    aligner = Aligner(plan_of(teacher_folder, stage, model=str(teacher_folder)), teacher=teacher, student=copy)
    output = aligner(input_ids)
    output.loss.backward()
    # 1 - cosine and the divergence are differences of rounded numbers near 1 and near the logits' size.
    assert abs(float(output.loss.detach())) < 1e-5
    gradients = [parameter.grad for parameter in copy.parameters() if parameter.grad is not None]
    assert gradients
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-5


@pytest.mark.parametrize("stage", [*({**_hidden(kind), **TOKENS} for kind in KINDS)])
def test_masked_tokens_do_not_count(
    teacher_folder: Path, teacher: PreTrainedModel, student: PreTrainedModel, input_ids: Tensor, stage: dict[str, Any]
) -> None:
    aligner = Aligner(plan_of(teacher_folder, stage), teacher=teacher, student=student)
    mask = torch.ones_like(input_ids)
    mask[:, 10:] = 0
    other = torch.where(mask.bool(), input_ids, (input_ids + 7) % 97)
    short = aligner(input_ids[:, :10])
    padded = aligner(input_ids, mask)
    scrambled = aligner(other, mask)
    for name, part in short.parts.items():
        # The same tokens in a longer row: the same sums in another blocking; 1 - cosine is rounded like numbers near 1.
        assert float(padded.parts[name]) == pytest.approx(float(part), rel=1e-5, abs=1e-6), name
        assert float(scrambled.parts[name]) == pytest.approx(float(part), rel=1e-5, abs=1e-6), name


def test_labels_leave_positions_out_of_the_token_objective(
    teacher_folder: Path, teacher: PreTrainedModel, student: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = Aligner(plan_of(teacher_folder, TOKENS), teacher=teacher, student=student)
    labels = input_ids.clone()
    labels[:, 10:] = -100
    assert float(aligner(input_ids, labels=labels).loss.detach()) == pytest.approx(
        float(aligner(input_ids[:, :10]).loss.detach()), rel=1e-5
    )


def test_the_loss_equals_the_dense_formula_in_float64(
    teacher_folder: Path, teacher: PreTrainedModel, student: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = Aligner(
        plan_of(teacher_folder, {**_hidden("normalised_mse"), **TOKENS}), teacher=teacher, student=student
    )
    output = aligner(input_ids)
    with torch.no_grad():
        ours = student.double()(input_ids, output_hidden_states=True)
        theirs = tiny_model("llama").double()(input_ids, output_hidden_states=True)
    p, q = (side.logits[:, :-1].log_softmax(-1) for side in (theirs, ours))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    entropy = -q.gather(-1, input_ids[:, 1:, None]).mean()
    assert float(output.parts["tokens"]) == pytest.approx(float(divergence + 0.5 * entropy), rel=1e-5)
    first, second = (side.hidden_states[1] for side in (ours, theirs))
    expected = ((first - second).square().sum(-1) / (second.square().sum(-1) + 1e-6)).mean()
    assert float(output.parts["stream.0"]) == pytest.approx(float(expected), abs=1e-9)
    first, second = (side.hidden_states[2] for side in (ours, theirs))
    expected = ((first - second).square().sum(-1) / (second.square().sum(-1) + 1e-6)).mean()
    assert float(output.parts["stream.1"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_teacher_is_outside_the_module(
    teacher_folder: Path, teacher: PreTrainedModel, student: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = Aligner(plan_of(teacher_folder, TOKENS), teacher=teacher, student=student)
    inside = {id(parameter) for parameter in aligner.parameters()}
    assert not inside & {id(parameter) for parameter in teacher.parameters()}
    aligner.train()
    assert not teacher.training
    aligner(input_ids).loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_one_s_own_loop_lowers_the_loss(
    teacher_folder: Path, teacher: PreTrainedModel, student: PreTrainedModel, input_ids: Tensor
) -> None:
    stage = {
        "train": ["mixers"],
        "inputs": "teacher",
        "align": [{"name": "out", "tap": "mixer_output", "layers": "replaced", "loss": {"kind": "relative_mse"}}],
    }
    aligner = Aligner(plan_of(teacher_folder, stage), teacher=teacher, student=student, stage="s0")
    optimizer = torch.optim.AdamW([p for p in aligner.parameters() if p.requires_grad], lr=1e-2)
    output, losses = aligner(input_ids=input_ids), []
    for _ in range(10):
        losses.append(float(output.loss.detach()))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        output = aligner(input_ids=input_ids)
    assert losses[-1] < 0.8 * losses[0]
    assert set(output.parts) == {"out.1"}


def test_an_unknown_stage_names_those_there_are(
    teacher_folder: Path, teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    with pytest.raises(UsageError, match=r"no such stage[\s\S]*0 \(s0\)"):
        Aligner(plan_of(teacher_folder, TOKENS), teacher=teacher, student=student, stage="logits")
