"""Calibration of a stage: projectors in closed form, statistics, heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.objectives.stages import PAIRS, TOKENS, Build, batches, both, entry, plan_of, token_rows
from xarch_kd.calibration.initialize import FIRST_TOKENS, prepare, tokens_to_prepare
from xarch_kd.errors import UsageError
from xarch_kd.losses import cka_loss
from xarch_kd.losses.standardize import Standardizer
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.models.conversion.convert import convert
from xarch_kd.planning.resolve import make_plan
from xarch_kd.projectors import Projector
from xarch_kd.testing.tiny import tiny_model
from xarch_kd.training.aligner import Aligner


@pytest.mark.parametrize("padding", [0, 5])
def test_projectors_start_as_the_ridge_regression_of_calibration_text(
    build: Build, teacher: PreTrainedModel, padding: int
) -> None:
    aligner = build(entry())
    assert tokens_to_prepare(aligner) >= 4 * 32
    assert prepare(aligner, batches(24, padding=padding)) == []
    ids = token_rows(24)
    for student, layer in PAIRS:
        own, target = (
            side[:, FIRST_TOKENS:].flatten(0, 1).double().detach()
            for side in both(aligner, teacher, ids, "hidden", (student, layer))
        )
        moments = own.T @ own / len(own)
        penalty = 1e-3 * moments.diagonal().mean() * torch.eye(32, dtype=torch.float64)
        expected = torch.linalg.solve(moments + penalty, own.T @ target / len(own)).T
        torch.testing.assert_close(aligner.projectors[f"e-{student}"].weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_too_little_text_leaves_auto_at_random_and_refuses_a_form_by_name(build: Build) -> None:
    aligner = build(entry())
    before = {name: tensor.clone() for name, tensor in aligner.projectors.state_dict().items()}
    notices = prepare(aligner, batches(2))
    assert "at random" in notices[0]
    assert "128" in notices[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in aligner.projectors.state_dict().items())
    with pytest.raises(UsageError, match=r"projector of e\.0: ridge") as error:
        prepare(build(entry(projector={"kind": "linear", "init": "ridge"})), batches(2))
    assert "33" in str(error.value.allowed)


def test_a_shared_projector_is_fitted_to_all_its_pairs(build: Build, teacher: PreTrainedModel) -> None:
    aligner = build(entry(projector={"kind": "orthogonal", "share": True, "init": "procrustes"}))
    prepare(aligner, batches(24))
    ids = token_rows(24)
    cross = torch.zeros(64, 32, dtype=torch.float64)
    for pair in PAIRS:
        own, target = (
            side[:, FIRST_TOKENS:].flatten(0, 1).double().detach()
            for side in both(aligner, teacher, ids, "hidden", pair)
        )
        cross += target.T @ own
    left, _, right = torch.linalg.svd(cross, full_matrices=False)
    projector = aligner.projectors["e"]
    assert isinstance(projector, Projector)
    torch.testing.assert_close(projector.matrix().double(), left @ right, rtol=1e-4, atol=1e-5)


def test_standardized_features_use_the_teachers_statistics(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = build(entry(loss={"kind": "huber", "standardize": True}))
    with pytest.raises(UsageError, match="statistics of calibration text"):
        aligner(input_ids)
    prepare(aligner, batches(24))
    ids = token_rows(24)
    expected = torch.zeros(())
    for pair in PAIRS:
        seen = both(aligner, teacher, ids, "hidden", pair)[1][:, FIRST_TOKENS:].flatten(0, 1).double()
        standardizer = Standardizer(seen.mean(0).float(), seen.std(0, correction=0).float())
        own, target = both(aligner, teacher, input_ids, "hidden", pair)
        projector = aligner.projectors[f"e-{pair[0]}"]
        assert isinstance(projector, Projector)
        z, t = (standardizer.apply(side) for side in (projector(own), target))
        expected = expected + torch.nn.functional.huber_loss(z, t)
    torch.testing.assert_close(aligner(input_ids).loss, expected, rtol=1e-4, atol=1e-6)


def test_a_standardized_relative_error_is_divided_by_the_standardized_energy(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = build(entry(layers=[{"student": 0, "teacher": 2}], loss={"kind": "relative_mse", "standardize": True}))
    prepare(aligner, batches(24))
    constants = aligner.entries[0].objectives[0].fitted
    standardizer = Standardizer(constants["mean"], constants["deviation"])
    own, target = both(aligner, teacher, input_ids, "hidden", (0, 2))
    projector = aligner.projectors["e-0"]
    assert isinstance(projector, Projector)
    z, t = standardizer.apply(projector(own)), standardizer.apply(target)
    torch.testing.assert_close(aligner(input_ids).loss, (z - t).square().sum() / t.square().sum(), rtol=1e-4, atol=1e-6)


def test_heads_are_assigned_on_calibration_text(teacher: PreTrainedModel, folders: dict[str, Path]) -> None:
    """A student whose heads are the teacher's in another order gets that order back."""
    order = torch.tensor([2, 3, 0, 1])
    student = tiny_model("llama", num_hidden_layers=4)
    student.load_state_dict(teacher.state_dict())
    for block in student.model.layers:
        attention = block.self_attn
        with torch.no_grad():
            attention.q_proj.weight.copy_(attention.q_proj.weight.view(4, 16, -1)[order].flatten(0, 1))
            attention.k_proj.weight.copy_(attention.k_proj.weight.view(2, 16, -1)[[1, 0]].flatten(0, 1))
    align = entry("mixing", [{"student": 1, "teacher": 1}], loss={"kind": "mixing", "heads": "assignment"})
    plan = plan_of({**folders, "same": folders["teacher"]}, align, student="same")
    aligner = Aligner(plan, teacher=teacher, student=student)
    prepare(aligner, batches(8))
    # Its block 0 permutes what block 1 sees, so only the matrices' likeness can tell.
    heads = aligner.entries[0].objectives[0].fitted["heads"]
    assert heads.sum(1).tolist() == [1, 1, 1, 1]
    assert heads.argmax(1).tolist() == order.tolist()


def test_learned_heads_start_even_and_move_to_the_likeliest(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = build(
        entry("mixing", loss={"kind": "mixing", "heads": "learned"}), student="llama", optimizer={"lr": 1e-3}
    )
    heads: Any = aligner.projectors["e-0-heads"]
    assert torch.equal(heads.weights().detach(), torch.full((2, 4), 0.25))
    output = aligner(input_ids)
    assert "e.0-heads" in output.parts
    output.loss.backward()
    assert heads.logits.grad is not None
    assert float(heads.logits.grad.abs().max()) > 0


def test_a_converted_student_shares_the_teachers_dimensions(
    teacher: PreTrainedModel, folders: dict[str, Path], input_ids: Tensor
) -> None:
    mapping = {
        "version": 1,
        "teacher": {"model": str(folders["teacher"])},
        "student": {"convert": {"mixer": "mamba2", "replace": [1]}},
        "data": {"builtin": "python-docs", "sequence_length": 16, "batch_size": 2},
        "stages": [
            {
                "name": "one",
                "steps": 1,
                "train": ["all"],
                "align": [entry(layers=[{"student": 2, "teacher": 2}], loss={"kind": "cka", "standardize": True})],
            }
        ],
    }
    plan = make_plan(MappingFile.model_validate_json(json.dumps(mapping)))
    aligner = Aligner(plan, teacher=teacher, student=convert(teacher, replace=[1]))
    prepare(aligner, batches(24))
    constants = aligner.entries[0].objectives[0].fitted
    standardizer = Standardizer(constants["mean"], constants["deviation"])
    own, target = both(aligner, teacher, input_ids, "hidden", (2, 2))
    expected = cka_loss(own, target, normalizer=TOKENS, standardizer=standardizer, shared_basis=True)
    torch.testing.assert_close(aligner(input_ids).loss, expected)


@pytest.mark.parametrize(
    ("align", "fitted"),
    [
        ({"projector": "linear"}, ["weight", "weight"]),
        ({"projector": {"kind": "linear", "init": "random"}}, []),
        # Pairs of its hidden units are the nearest linear map.
        ({"projector": "mlp"}, ["inner", "inner_bias", "outer"] * 2),
        (
            {"tap": "mixing", "loss": {"kind": "attention_bridge"}, "layers": [{"student": 0, "teacher": 1}]},
            ["weight"] * 2,
        ),
    ],
    ids=["linear", "random", "mlp", "bridge"],
)
def test_the_parameters_of_fitted_projectors_are_those_with_a_closed_form(
    build: Build, align: dict[str, Any], fitted: list[str]
) -> None:
    aligner = build(entry(**align))
    names = {id(parameter): name for name, parameter in aligner.projectors.named_parameters()}
    assert [names[id(found)].split(".")[-1] for found in aligner.fitted_parameters()] == fitted
