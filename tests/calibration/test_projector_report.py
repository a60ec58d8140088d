"""Reports of projectors on their own: text in halves, kinds, losses that see no size, what files hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from xarch_kd.calibration.projector_report import (
    ProjectorReport,
    alone,
    at_best_scale,
    halves,
    read_reports,
    reports,
    warnings_of,
    write_reports,
)
from xarch_kd.data.rows import Selection
from xarch_kd.errors import CheckpointError
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.models.conversion.convert import convert
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.projectors import PairStatistics, Projector, build_projector
from xarch_kd.projectors.closed_form import explained_variance
from xarch_kd.projectors.diagnostics import Diagnosis
from xarch_kd.taps.trace import trace
from xarch_kd.testing.rows import ids_of, rows_from, selection_from
from xarch_kd.testing.tiny import VOCABULARY
from xarch_kd.training.aligner import Aligner


def plan_of(folder: Path, **align: Any) -> Plan:
    entry = {"name": "stream", "tap": "hidden", "layers": "same", **align}
    mapping = {
        "version": 1,
        "teacher": {"model": str(folder)},
        "student": {"convert": {"mixer": "mamba2", "replace": [1]}},
        "data": {"builtin": "python-docs", "sequence_length": 16, "batch_size": 2},
        "stages": [{"name": "only", "steps": 1, "train": ["all"], "align": [entry]}],
    }
    # Through JSON, whose lists a strict model takes as tuples.
    return make_plan(MappingFile.model_validate_json(json.dumps(mapping)))


def aligner_of(teacher: PreTrainedModel, folder: Path, **align: Any) -> Aligner:
    return Aligner(plan_of(folder, **align), teacher=teacher, student=convert(teacher, replace=[1]))


def rows(number: int, seed: int = 0) -> Selection:
    return selection_from(torch.randint(1, VOCABULARY, (number, 16), generator=torch.Generator().manual_seed(seed)))


def test_halves_are_disjoint_and_bounded():
    text = torch.arange(40 * 16).view(40, 16)
    fitted, held_out = map(ids_of, halves(rows_from(text), 10 * 16, seed=3))
    assert fitted.shape == held_out.shape == (5, 16)
    assert not set(fitted.flatten().tolist()) & set(held_out.flatten().tolist())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    # What closed forms are fitted to comes first in this order.
    assert set(torch.cat([fitted, held_out])[:, 0].tolist()) == set(text[order[-10:], 0].tolist())
    assert [len(half) for half in halves(rows_from(text), 1, seed=3)] == [1, 1]
    assert [len(half) for half in halves(rows_from(text[:1]), 64, seed=3)] == [0, 1]


@pytest.mark.parametrize(
    "projector",
    [
        {"kind": "linear", "bias": True},
        {"kind": "low_rank", "rank": 8},
        {"kind": "mlp", "hidden": 96},
        {"kind": "orthogonal"},
    ],
    ids=lambda projector: projector["kind"],
)
def test_every_kind_is_measured_as_it_projects(projector, teacher, teacher_folder):
    aligner = Aligner(
        plan_of(teacher_folder, projector=projector), teacher=teacher, student=convert(teacher, replace=[1])
    )
    fitted, held_out = rows(48), rows(48, seed=1)
    known = alone(aligner, fitted, held_out)
    found = reports(aligner, held_out, known)
    assert [report.projector for report in found] == ["stream.0", "stream.1", "stream.2"]
    for report in found:
        module = aligner.projectors[report.projector.replace(".", "-")]
        layer = int(report.projector[-1])
        own, target = (
            _hidden(model, ids_of(held_out), layer)[:, 4:].flatten(0, 1).double()
            for model in (aligner.student, teacher)
        )
        with torch.no_grad():
            projected = module.double()(own)
        module.float()
        expected = 1 - (projected - target).square().sum() / (target - target.mean(0)).square().sum()
        # Features in float32.
        assert report.diagnosis.explained == pytest.approx(float(expected), abs=1e-5)
        assert report.diagnosis.kind == projector["kind"] and report.tokens == 48 * 12
        assert report.diagnosis.alone == known[report.projector]["explained"]
        assert report.diagnosis.alone is not None and report.diagnosis.alone > 0.1
    # Layer 0 is the teacher's own, so that all but a low rank find nearly all of it.
    first = found[0].diagnosis.alone
    assert first is not None and (first > 0.9) == (projector["kind"] != "low_rank")


def _hidden(model, ids, layer):
    with torch.no_grad():
        return trace(model, ids, taps=["hidden"], layers=[layer])["hidden"][layer]


def test_pairs_that_share_a_projector_have_one_report(teacher, teacher_folder):
    aligner = aligner_of(teacher, teacher_folder, projector={"kind": "linear", "share": True})
    (report,) = reports(aligner, rows(8), alone(aligner, rows(8), rows(8, seed=1)))
    assert report.pairs == ("stream.0", "stream.1", "stream.2") and report.tokens == 3 * 8 * 12


def test_measuring_leaves_student_modes_and_gradients_as_they_are(teacher, teacher_folder):
    aligner = aligner_of(teacher, teacher_folder, projector={"kind": "mlp", "hidden": 96}).train()
    before = {name: tensor.clone() for name, tensor in aligner.state_dict().items()}
    reports(aligner, rows(8), alone(aligner, rows(8), rows(8, seed=1)))
    assert aligner.training and aligner.student.training
    assert all(torch.equal(before[name], tensor) for name, tensor in aligner.state_dict().items())
    assert all(parameter.grad is None for parameter in aligner.parameters())


def test_one_row_of_text_leaves_nothing_to_fit_to(teacher, teacher_folder):
    aligner = Aligner(
        plan_of(teacher_folder, projector="linear"), teacher=teacher, student=convert(teacher, replace=[1])
    )
    found = alone(aligner, *halves(rows(1).rows, 64, seed=0))
    assert all(value["explained"] is None and "one row" in value["note"] for value in found.values()) and found


def test_few_tokens_a_dimension_are_said(teacher, teacher_folder):
    aligner = Aligner(
        plan_of(teacher_folder, projector="linear"), teacher=teacher, student=convert(teacher, replace=[1])
    )
    found = alone(aligner, rows(10), rows(10, seed=1))
    assert all(value["explained"] is not None and "lower bound" in value["note"] for value in found.values())
    assert all(value["note"] is None for value in alone(aligner, rows(22), rows(4, seed=1)).values())


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_a_size_that_the_loss_does_not_see_counts_for_nothing(bias):
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(400, 6, generator=generator).double() + 1.0
    projector = build_projector("linear", 6, 5, bias=bias, generator=generator)
    assert isinstance(projector, Projector)
    if bias:
        with torch.no_grad():
            projector.bias.fill_(0.7)  # type: ignore[union-attr]
    with torch.no_grad():
        projected = projector.double()(student)
    noise = 0.1 * torch.randn(400, 5, generator=generator).double()
    statistics = PairStatistics()
    statistics.update(student, 40 * (projected + noise))
    projector.float()
    _, weight, offset = projector.split(torch.zeros(1, 6))
    assert explained_variance(statistics, weight, offset) < 0.2
    found = at_best_scale(projector, statistics)
    scale = float((40 * (projected + noise) * projected).sum() / projected.square().sum())
    target = 40 * (projected + noise)
    residual = (scale * projected - target).square().sum()
    expected = float(1 - residual / (target - target.mean(0)).square().sum())
    # The weight is rounded to float32.
    assert explained_variance(found, weight, offset) == pytest.approx(expected, abs=1e-5) and expected > 0.9


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_only_the_cosine_is_read_at_its_best_size(kind, teacher, teacher_folder):
    aligner = aligner_of(teacher, teacher_folder, projector="linear", loss={"kind": kind})
    with torch.no_grad():
        for projector in aligner.projectors.values():
            assert isinstance(projector, Projector)
            projector.set_linear_map(3.0 * torch.eye(64).double())
    # Block 0 is the teacher's own.
    (first, *_) = reports(aligner, rows(16), {})
    assert (first.diagnosis.explained > 0.999) == (kind == "cosine")


def report_of(**changes: Any) -> ProjectorReport:
    values = {
        "kind": "linear",
        "rank": 3,
        "possible_rank": 4,
        "condition": math.inf,
        "explained": 0.5,
        "ceiling": 0.9,
        "alone": 0.25,
        "warnings": ("narrow: so",),
    }
    return ProjectorReport(
        stage="s", projector="p.1", pairs=("p.1",), tokens=7, diagnosis=Diagnosis(**{**values, **changes}), note=None
    )


def test_files_are_valid_json_and_come_back_whole(tmp_path):
    written = (report_of(), report_of(alone=None, condition=12.5, warnings=()))
    write_reports(tmp_path / "projectors.json", written)
    stored = json.loads((tmp_path / "projectors.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [entry["condition"] for entry in stored["projectors"]] == [None, 12.5]
    assert [entry["share"] for entry in stored["projectors"]] == [0.5, None]
    assert read_reports(tmp_path / "projectors.json") == written
    assert warnings_of(written) == ["stage s, projector p.1: narrow: so"]
    assert report_of().lines[0].startswith("projector p.1 (linear, rank 3 of 4, condition inf): explains 50%")
    assert report_of().lines[1] == "  warning: narrow: so"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"projectors": [{"stage": "s"}]}'])
def test_another_file_is_refused(text, tmp_path):
    (tmp_path / "projectors.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"projectors\.json"):
        read_reports(tmp_path / "projectors.json")
