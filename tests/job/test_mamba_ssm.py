"""Mapping files about students in mamba_ssm's format: read from it, written in it, refused for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xarch_kd.errors import ConversionError
from xarch_kd.job.train import train
from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.loading.load import load_model
from xarch_kd.models.mamba_ssm.format import export_mamba_ssm, import_mamba_ssm
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.mapping import LOGIT_STAGE, Write
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny Llama whose norms have the epsilon that mamba_ssm has."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model("llama", rms_norm_eps=1e-5).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return {"model": str(folder)}


def test_a_run_writes_the_student_in_both_formats(
    write_mapping: Write, teacher: dict[str, Any], tmp_path: Path
) -> None:
    mapping = {"convert": {"mixer": "mamba2", "replace": [1]}, "format": "mamba_ssm", "dtype": "bfloat16"}
    run = train(write_mapping(LOGIT_STAGE, teacher=teacher, student=mapping), tmp_path / "run")
    written = tmp_path / "run" / "mamba_ssm"
    student, foreign = load_model(str(run.student)), load_model(str(written))
    assert (student.config.model_type, foreign.config.model_type) == ("granitemoehybrid", "bamba")
    ids = torch.arange(1, 17)[None]
    assert student(ids, use_cache=False).logits.equal(foreign(ids, use_cache=False).logits)
    assert import_mamba_ssm(written).dtype == load_model(str(run.student), dtype=None).dtype
    files = json.loads((tmp_path / "run" / "manifest.json").read_text())["files"]
    assert {"mamba_ssm/config.json", "mamba_ssm/pytorch_model.bin", "mamba_ssm/tokenizer.json"} <= files.keys()


def test_without_the_key_there_is_one_format(write_mapping: Write, tmp_path: Path) -> None:
    train(write_mapping(LOGIT_STAGE), tmp_path / "run")
    assert not (tmp_path / "run" / "mamba_ssm").exists()


def test_a_student_of_that_format_trains_as_a_stock_model(
    write_mapping: Write, teacher: dict[str, Any], tmp_path: Path
) -> None:
    start = convert(load_model(teacher["model"]), mixer="mamba2", replace=[1])
    folder = export_mamba_ssm(start, tmp_path / "start", tiny_tokenizer())
    mapping = write_mapping(LOGIT_STAGE, teacher=teacher, student={"model": str(folder)})
    plan = make_plan(mapping)
    assert (plan.student.model_type, plan.student.reference) == ("bamba", str(folder))
    assert [row.index for row in plan.student.layers if row.replaced] == [1]
    trained = load_model(str(train(plan, tmp_path / "run").student)).state_dict()
    changed = {name for name, value in load_model(str(folder)).state_dict().items() if not value.equal(trained[name])}
    # A stage of `train: [mixers]`, of the one whose kind is not the teacher's.
    assert changed and all(name.startswith("model.layers.1.mamba.") for name in changed)


def test_what_the_format_cannot_hold_is_told_when_it_is_planned(write_mapping: Write) -> None:
    student = {"convert": {"mixer": "mamba2", "replace": [1]}, "format": "mamba_ssm"}
    with pytest.raises(ConversionError, match=r"mapping\.yaml:\d+:\d+: student\.format: (.|\n)*epsilon 1e-06"):
        make_plan(write_mapping(LOGIT_STAGE, student=student))
