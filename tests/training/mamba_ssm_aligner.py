"""A live model of mamba_ssm trained by `Aligner` in a loop of one's own, in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.mamba_ssm_peer import load_mamba_ssm
from xarch_kd.planning.resolve import make_plan
from xarch_kd.training.aligner import Aligner


def main(root: Path) -> None:
    """Write the losses of each stage, and which parameters learned, into `stages.json`."""
    model_class = load_mamba_ssm()
    teacher = AutoModelForCausalLM.from_pretrained(root / "teacher")
    student = model_class.from_pretrained(str(root / "student"))
    plan = make_plan(root / "mapping.yaml")
    told = []
    for stage in plan.stages:
        before = {name: value.detach().clone() for name, value in student.named_parameters()}
        aligner = Aligner(plan, teacher=teacher, student=student, stage=stage.index)
        learning = [parameter for parameter in aligner.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.0)
        losses = []
        for _ in range(8):
            loss = aligner(input_ids=torch.load(root / "ids.pt", weights_only=True)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        changed = [name for name, value in student.named_parameters() if not value.equal(before[name])]
        told.append({"stage": stage.stage.name, "losses": losses, "changed": changed})
    student.save_pretrained(str(root / "trained"))
    (root / "stages.json").write_text(json.dumps(told))
