"""Layers chosen by measurement at the start of a run: kept, reused, compared, and refused where they would cheat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from xarch_kd.cli.app import main
from xarch_kd.errors import CheckpointError, DataError, Interrupted, MappingFileError, UsageError
from xarch_kd.files import read_tensors
from xarch_kd.job import layer_choice
from xarch_kd.job.evaluate import evaluate
from xarch_kd.job.run import Run
from xarch_kd.job.train import train
from xarch_kd.models.cache_size import cache_layers, cache_size
from xarch_kd.planning.layer_choice import random_kept
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import same, signal_after, student_of

ONE_STEP = {**LOGIT_STAGE, "steps": 1}


def chosen(**options: Any) -> dict[str, Any]:
    return {
        "convert": {"mixer": "mamba2", "replace": {"strategy": "sensitivity", "budget": 2, "tokens": 64, **options}}
    }


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of measurements, appended to at each; a second one fails."""
    calls: list[int] = []
    measure = layer_choice._measured

    def counted(*arguments: Any) -> Any:
        assert not calls
        calls.append(1)
        return measure(*arguments)

    monkeypatch.setattr(layer_choice, "_measured", counted)
    return calls


def test_a_run_chooses_its_layers_once(write_mapping: Write, tmp_path: Path, measured_once: list[int]) -> None:
    mapping, folder = (
        write_mapping(student=chosen(), evaluate={"suites": ["likelihood"], "tokens": 64}),
        tmp_path / "run",
    )
    plan = make_plan(mapping)
    assert plan.is_unselected
    assert any("2 of 4 layers are replaced, which are chosen by measurement" in notice for notice in plan.warnings)
    with signal_after(1), pytest.raises(Interrupted):
        train(mapping, folder)
    train(mapping, folder, resume=True)
    assert measured_once == [1]

    run = Run(folder)
    selection = run.selection
    assert selection is not None
    order = sorted(selection.layers, key=lambda layer: -layer.kl)
    assert [layer.rank for layer in order] == [1, 2, 3, 4]
    assert selection.kept == tuple(sorted(layer.layer for layer in order[:2]))
    assert [one.name for one in selection.compared] == [
        "chosen", "uniform", "random 1", "random 2", "random 3", "random, mean",
    ]  # fmt: skip
    replaced = [layer for layer in range(4) if layer not in selection.kept]
    assert run.plan["conversion"]["replace"] == replaced
    assert run.plan["selection"]["kept"] == list(selection.kept)
    assert not any("stand in their place" in notice for notice in run.plan["warnings"])
    types = AutoConfig.from_pretrained(run.student).layer_types
    assert [index for index, kind in enumerate(types) if kind != "full_attention"] == replaced
    card = (run.student / "README.md").read_text()
    assert "chosen by sensitivity (kl)" in card
    assert "selection.json" in json.loads((folder / "manifest.json").read_text())["files"]
    assert evaluate(folder, tokens=32).result("held-out").tokens > 0
    assert str(selection.kept[0]) in str(run)

    # The same student as from the plain list that was found.
    listed = {"convert": {"mixer": "mamba2", "replace": replaced}}
    train(write_mapping(student=listed, name="list.yaml"), tmp_path / "list")
    assert same(student_of(folder), student_of(tmp_path / "list"))


def test_mixers_are_aligned_before_they_are_measured_and_the_student_starts_with_them(
    write_mapping: Write, tmp_path: Path
) -> None:
    frozen = {**ONE_STEP, "train": ["norms"], "optimizer": {"lr": 1.0e-9}}
    runs = {}
    for name, options in (("plain", {}), ("aligned", {"aligned": 6})):
        folder = tmp_path / name
        mapping = write_mapping(frozen, student=chosen(**options), name=f"{name}.yaml")
        with signal_after(1), pytest.raises(Interrupted):
            train(mapping, folder)
        # The second part reads the choice, and the mixers, from the folder.
        train(mapping, folder, resume=True)
        runs[name] = Run(folder).selection, student_of(folder)
    plain, aligned = (runs[name][0] for name in ("plain", "aligned"))
    assert plain is not None and aligned is not None
    assert (plain.aligned_steps, aligned.aligned_steps) == (0, 6)
    # Each mixer alone costs less, and so do all that are replaced.
    assert sum(layer.kl for layer in aligned.layers) < 0.9 * sum(layer.kl for layer in plain.layers)
    assert aligned.compared[0].kl < plain.compared[0].kl
    mixers, _ = read_tensors(tmp_path / "aligned" / layer_choice.MIXERS)
    student = runs["aligned"][1]
    assert mixers
    for key, tensor in mixers.items():
        layer, _, name = key.partition(".")
        assert torch.equal(student[f"model.layers.{layer}.mamba.{name}"], tensor)
    (tmp_path / "aligned" / layer_choice.MIXERS).write_bytes(b"damaged")
    (tmp_path / "aligned" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="selection-mixers"):
        train(tmp_path / "aligned.yaml", tmp_path / "aligned", resume=True)


def test_a_selection_that_is_not_of_the_run_is_refused(write_mapping: Write, tmp_path: Path) -> None:
    mapping, folder = write_mapping(MIXER_STAGE, student=chosen()), tmp_path / "run"
    with signal_after(1), pytest.raises(Interrupted):
        train(mapping, folder)
    stored = json.loads((folder / "selection.json").read_text())
    for content, message in (
        (json.dumps({**stored, "made_for": "0" * 64}), "is not of this mapping file"),
        (json.dumps({**stored, "kept": [0, 1, 2]}), "is not of this mapping file"),
        (json.dumps({**stored, "layers": None}), "is damaged"),
        ("{", "is damaged"),
    ):
        (folder / "selection.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            train(mapping, folder, resume=True)


def test_evaluation_text_is_no_text_to_choose_on(write_mapping: Write, tmp_path: Path, text_file: Path) -> None:
    data = {"files": [str(text_file)], "sequence_length": 16, "batch_size": 2}
    named = write_mapping(ONE_STEP, student=chosen(), data={**data, "evaluation": {"files": [str(text_file)]}})
    with pytest.raises(DataError, match="text that the student is evaluated on"):
        train(named, tmp_path / "named")
    also = write_mapping(ONE_STEP, student=chosen(), evaluate={"also": [{"files": [str(text_file)]}]})
    with pytest.raises(DataError, match="text that the student is evaluated on"):
        train(also, tmp_path / "also")


def test_plan_calibrate_shows_the_table(write_mapping: Write, capsys: pytest.CaptureFixture[str]) -> None:
    mapping = write_mapping(ONE_STEP, student=chosen(metric="both", always=[0]))
    assert main(["plan", str(mapping), "--calibrate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 in found["conversion"]["replace"]
    assert {"layer", "kl", "recall", "rank", "kept", "gate"} == set(found["selection"]["layers"][0])


def test_strategies_without_measurement_are_resolved_at_once(write_mapping: Write) -> None:
    options = {"strategy": "random", "budget": 2, "seed": 3}
    plan = make_plan(write_mapping(student={"convert": {"mixer": "mamba2", "keep_attention": options}}))
    assert not plan.is_unselected
    assert plan.conversion is not None
    convert = plan.mapping.student.convert
    assert convert is not None
    assert plan.conversion.keep_attention == random_kept(convert.selection, "keep_attention", 4, 2, 3)  # type: ignore[arg-type]


def test_bytes_of_cache_as_the_budget(write_mapping: Write) -> None:
    budget = {"cache_bytes": "300 KiB", "at_context": 400}
    plan = make_plan(write_mapping(student=chosen(budget=budget)))
    kept = [row.index for row in plan.student.layers if not row.replaced]
    layers = cache_layers(plan.models.student.layout)
    one = next(layer for layer, row in zip(layers, plan.student.layers, strict=True) if not row.replaced)
    assert cache_size(layers, 400, torch.float32) <= 300 * 1024
    more = one.size(400, torch.float32) - min(layer.size(400, torch.float32) for layer in layers)
    assert kept
    assert cache_size(layers, 400, torch.float32) + more > 300 * 1024
    with pytest.raises(MappingFileError, match="recurrent states of all layers alone take"):
        make_plan(write_mapping(student=chosen(budget={"cache_bytes": "1 KiB", "at_context": 400})))


def test_a_plan_without_its_layers_trains_nothing_by_hand(write_mapping: Write) -> None:
    import xarch_kd as xkd
    from xarch_kd.testing.tiny import tiny_model

    teacher = tiny_model("llama", num_hidden_layers=4)
    with pytest.raises(UsageError, match="layers of the conversion are not chosen yet"):
        xkd.Aligner(make_plan(write_mapping(student=chosen())), teacher=teacher, student=teacher)
