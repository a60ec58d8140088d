"""Mixing matrices as an objective of the aligner: values, masks, gradients, both kinds of inputs."""

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
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.taps.trace import trace
from xarch_kd.testing.tiny import tiny_model
from xarch_kd.training.aligner import Aligner

EXACT = ("auto", "reference", "streaming", "panels")


@pytest.fixture
def student(teacher: PreTrainedModel) -> PreTrainedModel:
    return convert(teacher, replace=[1])


def plan_of(
    folder: Path, *, inputs: str = "student", layers: str = "replaced", student: Any = None, **loss: Any
) -> Plan:
    entry = {"name": "map", "tap": "mixing", "layers": layers, "loss": {"kind": "mixing", **loss}}
    mapping = {
        "version": 1,
        "teacher": {"model": str(folder)},
        "student": student or {"convert": {"mixer": "mamba2", "replace": [1]}},
        "data": {"builtin": "python-docs", "sequence_length": 16, "batch_size": 2},
        "stages": [
            {"name": "one", "steps": 1, "train": ["all" if layers == "same" else "mixers"], "inputs": inputs}
            | {"align": [entry]}
        ],
    }
    return make_plan(MappingFile.model_validate_json(json.dumps(mapping)))


def dense_maps(model: PreTrainedModel, input_ids: Tensor, layer: int) -> Tensor:
    return trace(model, input_ids, taps=["mixing"], layers=[layer])["mixing"][layer].dense().double()


@pytest.mark.parametrize("implementation", EXACT)
def test_the_loss_equals_the_dense_formula(
    teacher_folder: Path, teacher: PreTrainedModel, student: PreTrainedModel, input_ids: Tensor, implementation: str
) -> None:
    plan = plan_of(teacher_folder, impl=implementation, weight=0.5)
    output = Aligner(plan, teacher=teacher, student=student)(input_ids)
    with torch.no_grad():
        theirs = tiny_model("llama")
        theirs.set_attn_implementation("eager")
        maps = theirs(input_ids, output_attentions=True).attentions[1].double()
        ours = dense_maps(student, input_ids, 1)
    expected = 0.5 * (1 - torch.nn.functional.cosine_similarity(maps, ours, dim=-1)).mean()
    assert float(output.parts["map.1"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) > 0.01


@pytest.mark.parametrize("distance", ["kl", "cosine", "frobenius", "relative_frobenius"])
def test_a_student_that_is_the_teacher_has_loss_and_gradient_zero(
    teacher_folder: Path, teacher: PreTrainedModel, input_ids: Tensor, distance: str
) -> None:
    copy = tiny_model("llama")
    plan = plan_of(teacher_folder, layers="same", student={"model": str(teacher_folder)}, distance=distance)
    output = Aligner(plan, teacher=teacher, student=copy)(input_ids)
    output.loss.backward()
    # Rounding of numbers near 1 in float32, 3 layers.
    assert abs(float(output.loss.detach())) < 1e-5
    gradients = [parameter.grad for parameter in copy.parameters() if parameter.grad is not None]
    assert len(gradients) > 3
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-5


@pytest.mark.parametrize("inputs", ["student", "teacher"])
def test_masked_tokens_do_not_count(
    teacher_folder: Path, teacher: PreTrainedModel, student: PreTrainedModel, input_ids: Tensor, inputs: str
) -> None:
    aligner = Aligner(plan_of(teacher_folder, inputs=inputs), teacher=teacher, student=student)
    mask = torch.ones_like(input_ids)
    mask[:, 10:] = 0
    short = aligner(input_ids[:, :10])
    padded = aligner(torch.where(mask.bool(), input_ids, (input_ids + 7) % 97), mask)
    assert float(padded.loss.detach()) == pytest.approx(float(short.loss.detach()), rel=1e-5)


def test_micro_batches_add_up(
    teacher_folder: Path, teacher: PreTrainedModel, student: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = Aligner(plan_of(teacher_folder), teacher=teacher, student=student)
    whole = float(aligner(input_ids).loss.detach())
    normalizers = LossNormalizers(tokens=torch.tensor(32.0))
    parts = [float(aligner(input_ids[row : row + 1], normalizers=normalizers).loss.detach()) for row in range(2)]
    assert sum(parts) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("loss", [{}, {"distance": "frobenius", "impl": "sketch"}, {"heads": [[0, 1, 0, 0]] * 4}])
@pytest.mark.parametrize("inputs", ["student", "teacher"])
def test_one_s_own_loop_lowers_the_loss(
    teacher_folder: Path,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    input_ids: Tensor,
    inputs: str,
    loss: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    aligner = Aligner(plan_of(teacher_folder, inputs=inputs, **loss), teacher=teacher, student=student)
    optimizer = torch.optim.AdamW([p for p in aligner.parameters() if p.requires_grad], lr=1e-2)
    outputs = []
    for _ in range(20):
        outputs.append(aligner(input_ids=input_ids))
        optimizer.zero_grad()
        outputs[-1].loss.backward()
        optimizer.step()
    assert float(outputs[-1].loss.detach()) < 0.8 * float(outputs[0].loss.detach())
    assert set(outputs[-1].parts) == {"map.1"}
