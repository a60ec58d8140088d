"""Heads that are made from the teacher's: fitted before training, or from a stage's projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from xarch_kd.calibration.head import fit_head_map, set_head
from xarch_kd.data.batches import Batch
from xarch_kd.errors import Interrupted, MappingFileError
from xarch_kd.job.train import train
from xarch_kd.models.loading.load import fresh_model
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan
from xarch_kd.taps.layout import layout_of
from xarch_kd.testing.mapping import LOGIT_STAGE, Write
from xarch_kd.testing.runs import same, signal_after, student_of
from xarch_kd.testing.tiny import tiny_config, tiny_model

RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})
SIZES: dict[str, Any] = {
    "model_type": "mamba2",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "chunk_size": 16,
    "tie_word_embeddings": False,
}
ENTRY: dict[str, Any] = {"name": "final", "tap": "head_input", "projector": "linear"}
FEATURES: dict[str, Any] = {
    "name": "final",
    "steps": 3,
    "train": ["all"],
    "align": [ENTRY],
    "evaluation": {"every": 2, "metric": "nll", "keep": "best"},
    "head": "from_projector",
}
LOGITS = {**LOGIT_STAGE, "steps": 2, "train": ["all"]}


def test_the_fitted_head_is_the_teachers_after_the_ridge_map_of_the_head_input() -> None:
    teacher, ids = tiny_model("llama"), torch.randint(0, 97, (8, 40), generator=torch.Generator().manual_seed(0))
    student: Any = fresh_model(tiny_config("mamba2", hidden_size=32, head_dim=8, tie_word_embeddings=False), seed=0)
    sides = layout_of(teacher), layout_of(student)
    found = fit_head_map(*sides, [Batch(input_ids=part) for part in ids.split(3)])
    assert found.tokens == 8 * 36
    set_head(*sides, found.weight)
    with torch.no_grad():
        wide = teacher.model(ids)[0][:, 4:].flatten(0, 1).double().numpy()
        own = student.backbone(ids)[0][:, 4:].flatten(0, 1).double().numpy()
    gram = own.T @ own / len(own)
    penalty = 1e-3 * numpy.trace(gram) / 32
    ridge = numpy.linalg.solve(gram + penalty * numpy.eye(32), own.T @ wide / len(own)).T
    expected = teacher.lm_head.weight.detach().double().numpy() @ ridge
    assert numpy.abs(student.lm_head.weight.detach().double().numpy() - expected).max() < 1e-5 * abs(expected).max()


def test_a_run_starts_from_the_fitted_head(write_mapping: Write, tmp_path: Path) -> None:
    losses = {}
    for head in ("fresh", "closed_form"):
        student = {"config": SIZES, "embeddings": "teacher", "head": head}
        stage = {**LOGITS, "steps": 1, "optimizer": {"lr": 1e-8}, "tokens": {"divergence": "forward_kl"}}
        run = train(write_mapping(stage, student=student, name=f"{head}.yaml"), tmp_path / head)
        losses[head] = run.metrics["logits/loss"]
    assert losses["closed_form"] < 0.9 * losses["fresh"]
    assert set(load_file(tmp_path / "closed_form" / "head_map.safetensors")) == {"map"}


def test_a_stage_of_the_head_input_alone_trains_and_leaves_its_projector_in_the_head(
    write_mapping: Write, tmp_path: Path, teacher_folder: Path
) -> None:
    # A stage without tokens that matches the head input ended in an assertion once.
    run = train(write_mapping(FEATURES, student={"config": SIZES}), tmp_path / "run")
    student = student_of(tmp_path / "run")
    projector = next(iter(load_file(run.folder.projectors).values()))
    assert projector.shape == (64, 32)
    teacher = load_file(teacher_folder / "model.safetensors")
    head = teacher.get("lm_head.weight", teacher["model.embed_tokens.weight"])
    torch.testing.assert_close(student["lm_head.weight"], head @ projector)
    assert run.metrics["final/final"] > 0


def test_a_run_with_both_resumes_to_bitwise_the_same_student(write_mapping: Write, tmp_path: Path) -> None:
    student = {"config": SIZES, "head": "closed_form"}
    mapping = write_mapping(FEATURES, {**LOGITS, "train": ["blocks"]}, student=student)
    train(mapping, tmp_path / "whole")
    with signal_after(4), pytest.raises(Interrupted):
        train(mapping, tmp_path / "stopped")
    train(mapping, tmp_path / "stopped", resume=True)
    assert same(student_of(tmp_path / "stopped"), student_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("student", "stage", "message"),
    [
        ({"config": {**SIZES, "tie_word_embeddings": True}, "head": "closed_form"}, LOGITS, "head is its embedding"),
        ({"config": {**SIZES, "vocab_size": 120}, "head": "closed_form"}, LOGITS, "vocabulary has 120 rows"),
        (
            {"convert": {"mixer": "mamba2", "replace": [1]}, "head": "closed_form"},
            LOGITS,
            "head: closed_form is for a student built fresh from a config",
        ),
        ({"config": {**SIZES, "tie_word_embeddings": True}}, FEATURES, "head is its embedding"),
        ({"config": SIZES}, {**LOGITS, "head": "from_projector"}, "the stage has no entries of that tap"),
        (
            {"config": SIZES},
            {**FEATURES, "align": [{**ENTRY, "projector": {"kind": "linear", "bias": True}}]},
            "has a bias, for which the head has no place",
        ),
        (
            {"config": SIZES},
            {**FEATURES, "align": [{**ENTRY, "projector": "mlp"}]},
            "the projector of final is mlp. Use projector: linear",
        ),
        (
            {"config": SIZES},
            {**FEATURES, "align": [{**ENTRY, "loss": {"kind": "mse", "standardize": True}}]},
            "compares standardized features",
        ),
    ],
    ids=["tied", "vocabulary", "converted", "stage-tied", "no-entry", "bias", "mlp", "standardized"],
)
def test_heads_that_cannot_be_made_are_refused(
    write_mapping: Write, student: dict[str, Any], stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(MappingFileError) as caught:
        make_plan(write_mapping(stage, student=student), rates=RATES)
    assert message in "\n".join(caught.value.problems)
