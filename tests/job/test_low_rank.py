"""Stages that train low-rank adapters, which are merged into a stock student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from xarch_kd.errors import Interrupted, MappingFileError
from xarch_kd.job.train import train
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import same, signal_after, student_of

pytest.importorskip("peft")

RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})
STAGE: dict[str, Any] = {**LOGIT_STAGE, "train": ["mixers", {"lora": {"rank": 2}}], "optimizer": {"lr": 1e-2}}
MIXERS: dict[str, Any] = {**MIXER_STAGE, "steps": 1}


def test_adapters_change_attention_and_mlps_by_matrices_of_their_rank(write_mapping: Write, tmp_path: Path) -> None:
    plan = make_plan(write_mapping(MIXERS, STAGE), rates=RATES)
    stage = plan.stages[1]
    assert stage.lora is not None
    assert set(stage.lora.modules) == {
        *(f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 3) for part in "qkvo"),
        *(f"model.layers.{layer}.shared_mlp.{part}put_linear" for layer in range(4) for part in ("in", "out")),
    }
    without = make_plan(write_mapping(MIXERS, {**STAGE, "train": ["mixers"]}), rates=RATES).stages[1]
    assert stage.trainable == without.trainable
    assert stage.trainable_parameters == without.trainable_parameters + stage.lora.parameters

    train(plan, tmp_path / "run")
    before_stage = write_mapping(MIXERS, {**STAGE, "train": ["mixers"]}, name="mixers.yaml")
    train(before_stage, tmp_path / "mixers")
    student, other = student_of(tmp_path / "run"), student_of(tmp_path / "mixers")
    assert student.keys() == other.keys()
    adapted = [name for name in student if name.removesuffix(".weight") in stage.lora.modules]
    for name in adapted:
        assert torch.linalg.matrix_rank((student[name] - other[name]).double(), rtol=1e-4) == 2
    rest = [name for name in student if name not in adapted and ".mamba." not in name]
    assert all(torch.equal(student[name], other[name]) for name in rest)
    # The folder is a stock checkpoint, without a trace of peft.
    assert not [path.name for path in (tmp_path / "run" / "student").iterdir() if "adapter" in path.name]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert type(loaded).__module__.startswith("transformers.")


def test_a_run_with_adapters_resumes_to_bitwise_the_same_student(write_mapping: Write, tmp_path: Path) -> None:
    mapping = write_mapping(STAGE, {**LOGIT_STAGE, "name": "after"})
    train(mapping, tmp_path / "whole")
    # Inside the stage of adapters, and after it.
    for count in (1, 4):
        run = tmp_path / f"stopped-{count}"
        with signal_after(count), pytest.raises(Interrupted):
            train(mapping, run)
        train(mapping, run, resume=True)
        assert same(student_of(run), student_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**MIXER_STAGE, "train": ["mixers", {"lora": {}}]}, "lora is for stages with inputs: student"),
        ({**STAGE, "train": [{"lora": {}}, {"lora": {"rank": 4}}]}, "train has lora twice"),
        ({**STAGE, "train": [{"lora": {"on": []}}]}, "lora.on"),
    ],
    ids=["teacher-inputs", "twice", "nothing"],
)
def test_adapters_that_cannot_train_are_refused(write_mapping: Write, stage: dict[str, Any], message: str) -> None:
    with pytest.raises(MappingFileError) as caught:
        make_plan(write_mapping(stage), rates=RATES)
    assert message in "\n".join(caught.value.problems)


def test_a_missing_package_is_named(write_mapping: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xarch_kd.planning.low_rank.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MappingFileError) as caught:
        make_plan(write_mapping(STAGE), rates=RATES)
    assert "pip install 'xarch_kd[lora]'" in "\n".join(caught.value.problems)
