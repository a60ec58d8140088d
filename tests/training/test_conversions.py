"""Every conversion target as the student of a stage: what is planned, what trains, what stays frozen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.models.conversion.convert import convert, plan_conversion
from xarch_kd.models.conversion.frozen_parameters import frozen_parameters
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer
from xarch_kd.training.aligner import Aligner

OUTPUT = {"name": "output", "tap": "mixer_output", "layers": "replaced", "loss": {"kind": "relative_mse"}}


def plan_of(folder: Path, student: dict[str, Any], train: str, **stage: Any) -> Plan:
    mapping = {
        "version": 1,
        "teacher": {"model": str(folder)},
        "student": student,
        "data": {"builtin": "python-docs", "sequence_length": 16, "batch_size": 2},
        "stages": [{"name": "only", "steps": 1, "train": [train], **stage}],
    }
    return make_plan(MappingFile.model_validate_json(json.dumps(mapping)))


def saved(folder: Path, model_type: str) -> Path:
    tiny_model(model_type).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "mixer", "target", "student_type"),
    [
        ("granite", "mamba2", "auto", "granitemoehybrid"),
        ("qwen3", "gated_delta", "auto", "qwen3_5_text"),
        ("olmo2", "gated_delta", "olmo_hybrid", "olmo_hybrid"),
        ("llama", "gated_delta", "qwen3_5", "qwen3_5_text"),
    ],
)
def test_a_new_mixer_learns_what_the_attention_gave(
    tmp_path: Path, model_type: str, mixer: str, target: str, student_type: str
) -> None:
    chosen = {"mixer": mixer, "target": target, "replace": [1]}
    plan = plan_of(saved(tmp_path / "teacher", model_type), {"convert": chosen}, "mixers", align=[OUTPUT])
    assert plan.student_config["model_type"] == student_type
    assert [row.index for row in plan.student.layers if row.replaced] == [1]
    teacher = tiny_model(model_type).requires_grad_(False)
    student = convert(teacher, mixer=mixer, target=target, replace=[1])
    aligner = Aligner(plan, teacher=teacher, student=student)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == set(plan.stages[0].trainable)
    assert all(name.startswith("model.layers.1.") for name in trained)
    rows = torch.randint(2, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([one for one in student.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = aligner(rows).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_no_stage_trains_what_must_stay_frozen(tmp_path: Path) -> None:
    folder = saved(tmp_path / "teacher", "llama")
    chosen: dict[str, Any] = {"mixer": "gated_delta", "replace": [1]}
    tokens = {"divergence": "forward_kl"}
    plan = plan_of(folder, {"convert": chosen}, "all", tokens=tokens)
    teacher = tiny_model("llama").requires_grad_(False)
    frozen = set(plan_conversion(teacher.config, **chosen).frozen)
    assert len(frozen) == 8 and not frozen & set(plan.stages[0].trainable)
    assert any("stay frozen" in told for told in plan.warnings)

    convert(teacher, **chosen).save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    later = plan_of(folder, {"model": str(tmp_path / "student")}, "all", tokens=tokens)
    Aligner(later, teacher=teacher, student=again)
    assert {name for name, parameter in again.named_parameters() if not parameter.requires_grad} == frozen
    assert set(frozen_parameters(again)) == frozen
