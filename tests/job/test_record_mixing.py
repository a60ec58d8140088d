"""Mixing matrices that a run records, and its report with them."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import xarch_kd as xkd
from xarch_kd.files import read_tensors
from xarch_kd.report.page import write_report
from xarch_kd.testing.mapping import LOGIT_STAGE, Write


def test_a_run_records_what_its_student_mixes_and_the_report_draws_it(write_mapping: Write, tmp_path: Path) -> None:
    path = write_mapping({**LOGIT_STAGE, "steps": 1})
    run = xkd.train(path, tmp_path / "run", console=Console(quiet=True))
    matrices, _ = read_tensors(run.folder.mixing)
    assert {name.split(".", 1)[1].rsplit(".", 1)[0] for name in matrices} == {
        f"{side}.{layer}" for side in ("teacher", "student") for layer in (1, 2)
    }
    assert all(matrix.shape == (16, 16) and not matrix.triu(1).any() for matrix in matrices.values())
    teacher = [matrix for name, matrix in matrices.items() if ".teacher." in name]
    assert all(torch.allclose(matrix.sum(1), torch.ones(16), atol=1e-5) for matrix in teacher)
    assert AutoModelForCausalLM.from_pretrained(run.student).config.num_hidden_layers == 4
    text = write_report(run.path).read_text()
    assert text.count('aria-label="Token-mixing matrices: teacher, layer ') == 2
    assert "teacher, layer 2, head" in text and "student, layer 2, head" in text
