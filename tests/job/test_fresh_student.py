"""A student built fresh from sizes in the mapping file, with the teacher's embeddings or its own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from xarch_kd.errors import MappingFileError
from xarch_kd.job.models import load_models, load_run_tokenizer
from xarch_kd.models.loading.load import fresh_model
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.report import Reporter
from xarch_kd.testing.mapping import LOGIT_STAGE, Write
from xarch_kd.testing.tiny import tiny_config

SIZES: dict[str, Any] = {
    "model_type": "mamba2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "chunk_size": 16,
}
RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})
STAGE = {**LOGIT_STAGE, "train": ["all"], "optimizer": {"lr": 1e-3, "mixer_lr": 1e-2}}


def models_of(path: Path) -> tuple[Any, list[str], tuple[str, ...]]:
    plan = make_plan(path, rates=RATES)
    printed = io.StringIO()
    models = load_models(plan, load_run_tokenizer(plan), Reporter(Console(file=printed)))
    return models, printed.getvalue().splitlines(), plan.warnings


def test_its_sizes_are_the_files_and_its_tokens_the_teachers(write_mapping: Write) -> None:
    plan = make_plan(write_mapping(STAGE, student={"config": SIZES}), rates=RATES)
    assert (plan.student.reference, plan.student.dim, len(plan.student.layers)) == ("fresh mamba2", 32, 2)
    assert plan.student.vocabulary == plan.teacher.vocabulary == 97
    assert set(plan.stages[0].mixers) == {name for name in plan.stages[0].trainable if ".mixer." in name}
    assert plan.stages[0].mixers


def test_it_starts_from_its_own_embeddings_or_the_teachers(write_mapping: Write) -> None:
    fresh, said, _ = models_of(write_mapping(STAGE, student={"config": SIZES}))
    assert not any("embedding" in line for line in said)
    given, said, warnings = models_of(write_mapping(STAGE, student={"config": SIZES, "embeddings": "teacher"}))
    assert warnings == ("the student's embeddings start as the teacher's, projected from 64 dimensions onto 32",)
    assert any(line.startswith("the student's embedding starts as the teacher's: 97 rows, 64 to 32") for line in said)
    states = fresh.student.state_dict(), given.student.state_dict()
    differing = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert differing == {"backbone.embeddings.weight", "lm_head.weight"}


@pytest.mark.parametrize("source", ["convert", "model"])
def test_embeddings_of_other_students_are_their_own(write_mapping: Write, tmp_path: Path, source: str) -> None:
    fresh_model(tiny_config("llama"), seed=0).save_pretrained(tmp_path / "own")
    value = {"mixer": "mamba2", "replace": [1]} if source == "convert" else str(tmp_path / "own")
    path = write_mapping(STAGE, student={source: value, "embeddings": "teacher"})
    with pytest.raises(MappingFileError, match="embeddings: teacher is for a student built fresh from a config"):
        make_plan(path, rates=RATES)


def test_problems_of_sizes_are_told_at_their_lines(write_mapping: Write) -> None:
    path = write_mapping(STAGE, student={"config": {**SIZES, "hiden_size": 3, "auto_map": {"a": "b"}}})
    with pytest.raises(MappingFileError) as caught:
        make_plan(path, rates=RATES)
    lines = path.read_text().splitlines()
    heads = [problem.splitlines()[0] for problem in caught.value.problems]
    assert len(heads) == 2
    for head, key in zip(heads, ("hiden_size", "auto_map"), strict=True):
        number = int(head.split(":")[1])
        # A mapping's own position is where its first entry is.
        assert any(lines[row].strip().startswith(key) for row in (number - 1, number - 2)), head
        assert f"student.config.{key}: " in head


def test_a_config_of_another_kind_is_told(write_mapping: Write) -> None:
    with pytest.raises(MappingFileError, match="must be text, or a mapping with a model_type and its sizes, found"):
        make_plan(write_mapping(STAGE, student={"config": [1, 2]}), rates=RATES)
