"""Layer maps that follow from data: what is measured, that it recovers layers, that a run keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.calibration.layer_similarity import layer_similarity
from xarch_kd.cli.app import main
from xarch_kd.data.batches import Batch
from xarch_kd.errors import CheckpointError, DataError
from xarch_kd.job.calibrate import calibrated
from xarch_kd.job.models import RunModels
from xarch_kd.job.train import train
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.ops import similarity
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.report import Reporter
from xarch_kd.taps.layout import layout_of
from xarch_kd.taps.trace import trace
from xarch_kd.testing.mapping import TEXT
from xarch_kd.testing.rows import rows_from
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

DEPTH = 5


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=DEPTH).requires_grad_(False)


@pytest.fixture(scope="module")
def student(teacher: PreTrainedModel) -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def folders(
    teacher: PreTrainedModel, student: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    found = []
    for name, model in (("teacher", teacher), ("student", student)):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        found.append(folder)
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"{number}. {TEXT}" for number in range(120)), encoding="utf-8")
    return found[0], found[1], text


@pytest.fixture
def mapping(folders: tuple[Path, Path, Path], tmp_path: Path) -> Any:
    def write(layers: Any = "monotone", **changes: Any) -> Path:
        align = [{"name": "stream", "tap": "hidden", "layers": layers}]
        content = {
            "version": 1,
            "teacher": {"model": str(folders[0])},
            "student": {"model": str(folders[1])},
            "data": {"files": [str(folders[2])], "sequence_length": 16, "batch_size": 2},
            "device": "cpu",
            "calibration": {"tokens": 512},
            "stages": [{"name": "one", "steps": 2, "train": ["all"], "align": align}],
            **changes,
        }
        path = tmp_path / "mapping.yaml"
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return write


def rows_of(count: int, time: int = 16) -> Tensor:
    return torch.randint(2, 97, (count, time), generator=torch.Generator().manual_seed(0))


def test_it_is_the_debiased_similarity_of_standardized_features(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    rows = rows_of(24)
    found = layer_similarity("hidden", layout_of(teacher), layout_of(student), [Batch(input_ids=rows)])
    assert found.shape == (2, DEPTH)
    ours, theirs = (trace(model, rows, taps=["hidden"])["hidden"] for model in (student, teacher))
    parts = []
    for position in range(4, 16):
        sides = []
        for features in (ours[1], theirs[3]):
            kept = features[:, 4:].double()
            sides.append(((kept - kept.mean((0, 1))) / kept.std((0, 1)))[:, position - 4])
        parts.append(similarity(*sides, impl="reference"))
    together, ours_alone, theirs_alone = (
        sum(float(getattr(part, name)) for part in parts) for name in ("together", "student", "teacher")
    )
    # Features are standardized in float32.
    assert float(found[1, 3]) == pytest.approx(together / (ours_alone * theirs_alone) ** 0.5, abs=1e-5)


@pytest.mark.parametrize("strategy", ["cka", "monotone", "optimal_transport"])
def test_blocks_of_the_teacher_are_found_again(teacher: PreTrainedModel, strategy: str, mapping: Any) -> None:
    # The same model on both sides: each layer is most alike itself.
    plan = make_plan(mapping(strategy, student=mapping_student(mapping)))
    models = RunModels(teacher=teacher, student=teacher, tokenizer=tiny_tokenizer(), student_tokenizer=tiny_tokenizer())
    found = calibrated(plan, models, rows_from(rows_of(32)), Reporter.silent())
    assert [(pair.student_layer, pair.teacher_layer) for pair in found.stages[0].pairs] == [
        (layer, layer) for layer in range(DEPTH)
    ]


def mapping_student(mapping: Any) -> dict[str, str]:
    return {"model": json.loads(mapping().read_text())["teacher"]["model"]}


def test_a_plan_says_that_uniform_stands_in_until_then(mapping: Any) -> None:
    plan = make_plan(mapping("cka"))
    assert plan.uncalibrated == ((0, "stream"),)
    assert any("uniform stands in" in warning for warning in plan.warnings)
    assert [(pair.student_layer, pair.teacher_layer) for pair in plan.stages[0].pairs] == [(0, 2), (1, 4)]
    assert make_plan(mapping("uniform")).uncalibrated == ()


def test_a_run_keeps_what_it_measured(mapping: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    train(mapping(), run)
    kept = load_file(run / "calibration.safetensors")
    assert kept["0.stream"].shape == (2, DEPTH)
    plan = json.loads((run / "plan.json").read_text())
    assert plan["stages"][0]["layer_map_plots"]["stream"].startswith("monotone:")
    torch.testing.assert_close(torch.tensor(plan["similarities"]["one.stream"]).double(), kept["0.stream"])
    assert not any("stands in" in warning for warning in plan["warnings"])
    # An unfinished run goes on without measuring again.
    (run / "manifest.json").unlink()
    monkeypatch.setattr("xarch_kd.job.calibrate.measure_similarities", lambda *_, **__: pytest.fail("measured again"))
    train(mapping(), run, resume=True)
    (run / "manifest.json").unlink()
    (run / "calibration.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="delete it"):
        train(mapping(), run, resume=True)


def test_the_command_line_shows_the_map(mapping: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(mapping("cka")), "--calibrate"]) == 0
    shown = capsys.readouterr()
    assert "cka: student layers down, teacher layers across" in shown.out
    assert "similarity (CKA) for one.stream, " in shown.out
    assert "calibration on about 512 tokens" in shown.err


def test_too_little_text(teacher: PreTrainedModel, mapping: Any) -> None:
    plan: Plan = make_plan(mapping("cka"))
    models = RunModels(teacher=teacher, student=teacher, tokenizer=tiny_tokenizer(), student_tokenizer=tiny_tokenizer())
    with pytest.raises(DataError, match=r"too little text[\s\S]*7 rows"):
        calibrated(plan, models, rows_from(rows_of(7)), Reporter.silent())


def test_mixing_is_no_feature(mapping: Any) -> None:
    content = json.loads(mapping("cka").read_text())
    content["stages"][0]["align"] = [{"name": "map", "tap": "mixing", "layers": "cka"}]
    with pytest.raises(Exception, match="cka compares features, and mixing is none"):
        make_plan(MappingFile.model_validate_json(json.dumps(content)))
