"""Runs on two processes: equal to one process, resumable, and refused or ended together when they cannot be equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.job.rank_cases import RATES, main
from tests.job.test_shipped import FAMILIES, FILES, shrunk, teachers
from tests.training.test_micro_batches import HYBRID, TRANSFORMER
from xarch_kd.errors import UsageError
from xarch_kd.job.split import split_notices
from xarch_kd.job.train import train
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.launch import launch, on_ranks
from xarch_kd.testing.mapping import LOGIT_STAGE, Write
from xarch_kd.testing.runs import events_of, same, student_of
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

__all__ = ["teachers"]

STEPS = 20
# A shipped file whose features are cached.
ALSO_IN_FLOAT32 = "smollm2-135m--mamba2-hybrid-radlads"
AUTO: dict[str, Any] = {
    **LOGIT_STAGE,
    "gradient_accumulation": 2,
    "align": [{"name": "stream", "tap": "hidden", "layers": "replaced", "loss": {"kind": "mse", "weight": "auto"}}],
}
SHIPPED = [path.stem for path in FILES]
IN_FLOAT32 = ["float32", "weight-auto"]


def content(path: Path, teachers: dict[str, str], text: Path, rows: int) -> dict[str, Any]:
    """Return a shipped file on a tiny teacher, with 20 steps in all and `rows` rows in every micro-batch."""
    found = shrunk(path, teachers[FAMILIES[path.stem.split("--")[0]]], text)
    found["data"]["batch_size"] = rows
    for stage in found["stages"]:
        stage["steps"] = -(-STEPS // len(found["stages"]))
        stage.pop("batch_size", None)
    return found


def in_float32(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "stages": [{**stage, "precision": "float32"} for stage in found["stages"]]}


def without_repeats(found: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping without a bound on its batches, whose order would depend on their size."""
    repeats = ("batches", "cache")
    return {**found, "stages": [{key: stage[key] for key in stage if key not in repeats} for stage in found["stages"]]}


def row_by_row(found: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping of two rows per micro-batch with two micro-batches of one row, which is what each rank gets.

    In bfloat16 the gradient of a micro-batch is rounded before it is added to others.
    """
    stages = [
        {**stage, "batch_size": 1, "gradient_accumulation": 2 * stage.get("gradient_accumulation", 1)}
        for stage in found["stages"]
    ]
    # What is fitted to calibration text before a stage reads batches of the data's own size, as on each rank.
    return {**found, "stages": stages}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, str], text_file: Path) -> Path:
    """The folder of all runs: `NAME-one` and `NAME-two` on one and two processes, and the runs that are disturbed."""
    root = tmp_path_factory.mktemp("ranks")
    mappings = {path.stem: without_repeats(content(path, teachers, text_file, 2)) for path in FILES}
    alone = {name: row_by_row(found) for name, found in mappings.items()}
    (cached,) = [path for path in FILES if path.stem == ALSO_IN_FLOAT32]
    mappings["float32"] = alone["float32"] = in_float32(content(cached, teachers, text_file, 4))
    short = {
        "version": 1,
        "teacher": {"model": teachers["llama"]},
        "student": {"convert": {"mixer": "mamba2", "replace": [1, 2]}},
        "data": {"files": [str(text_file)], "sequence_length": 16, "batch_size": 4},
        "device": "cpu",
    }
    mappings["weight-auto"] = alone["weight-auto"] = {**short, "stages": [{**AUTO, "steps": STEPS}]}
    mappings["short"] = mappings["rank-0"] = {**short, "stages": [{**LOGIT_STAGE, "steps": 4}]}
    mappings["rank-1"] = {**mappings["short"], "seed": 1}
    mappings |= {f"{name}-one": found for name, found in alone.items()}
    for name, found in mappings.items():
        # Through JSON, so that a dict used twice is not written as an anchor.
        text = yaml.safe_dump(json.loads(json.dumps(found)), sort_keys=False)
        (root / f"{name}.yaml").write_text(text, encoding="utf-8")
    for name in (*SHIPPED, *IN_FLOAT32):
        train(make_plan(root / f"{name}-one.yaml", rates=RATES), root / f"{name}-one")

    def case(name: str, output: str, **more: Any) -> dict[str, Any]:
        return {"mapping": str(root / f"{name}.yaml"), "output": str(root / output), **more}

    runs = [
        *(case(name, f"{name}-two") for name in (*SHIPPED, *IN_FLOAT32)),
        case("short", "whole"),
        case("short", "stopped", interrupt_at=2),
        case("short", "stopped", resume=True),
        case("rank-RANK", "other-mapping"),
        case("short", "other-data", other_data=True),
        case("short", "broken", fail_at=2),
    ]
    cases = root / "cases.json"
    tiny_model("llama").save_pretrained(root / "teacher")
    tiny_tokenizer().save_pretrained(root / "teacher")
    cases.write_text(json.dumps({"teacher": str(root / "teacher"), "runs": runs}))
    on_ranks(2, main, cases, timeout=900)
    return root


@pytest.mark.timeout(1000)
def test_the_command_line_trains_on_two_processes_and_prints_once(tmp_path: Path, write_mapping: Write) -> None:
    mapping = write_mapping({**LOGIT_STAGE, "steps": 2}, evaluate={"suites": ["likelihood"], "tokens": 64})
    done = launch(2, "-m", "xarch_kd", "train", str(mapping), "--output", str(tmp_path / "run"), timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("logits  step 2/2") == done.stdout.count("finished: ") == 1
    assert done.stdout.count("held-out") >= 1
    files = json.loads((tmp_path / "run" / "manifest.json").read_text())["files"]
    assert {"student/model.safetensors", "evaluation.json", "events.jsonl"} <= files.keys()
    assert [event["step"] for event in events_of(tmp_path / "run") if event["event"] == "step"] == [1, 2]


def test_fewer_rows_than_processes_are_refused_and_objectives_that_are_no_sums_named(write_mapping: Write) -> None:
    cka = {"name": "stream", "tap": "hidden", "layers": "replaced", "loss": {"kind": "cka"}}
    plan = make_plan(write_mapping({**LOGIT_STAGE, "align": [cka]}), rates=RATES)
    assert [notice.split(" is computed")[0] for notice in split_notices(plan, 2)] == ["stage logits, stream: CKA"]
    with pytest.raises(UsageError, match="fewer rows than there are processes"):
        list(split_notices(plan, 3))


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([event["loss"] for event in events_of(run) if event["event"] == "step"], dtype=torch.float64)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", SHIPPED)
def test_two_processes_train_the_student_of_one_on_every_shipped_file(folder: Path, name: str) -> None:
    one, two = folder / f"{name}-one", folder / f"{name}-two"
    assert [event["processes"] for event in events_of(two) if event["event"] == "started"] == [2]
    assert len(losses(one)) >= STEPS
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-6, atol=0)
    # Two terms are added, so their order makes no difference.
    assert same(student_of(two), student_of(one))


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_two_processes_equal_one_with_all_rows_in_float32(folder: Path, name: str) -> None:
    one, two = folder / f"{name}-one", folder / f"{name}-two"
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-6, atol=0)
    expected, found = student_of(one), student_of(two)
    assert expected.keys() == found.keys()
    # AdamW divides by the root of each entry's own squared gradient, so rounding shows most in the smallest entries.
    for key, weights in expected.items():
        torch.testing.assert_close(
            found[key], weights, rtol=1e-6, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    difference, size = (
        torch.stack([tensor.double().norm() for tensor in tensors]).norm()
        for tensors in ([found[key] - expected[key] for key in expected], expected.values())
    )
    assert difference < 1e-6 * size


@pytest.mark.timeout(1000)
def test_gradients_with_unequal_tokens_per_rank_equal_those_of_one_process(folder: Path) -> None:
    errors = [json.loads((folder / f"gradients-{rank}.json").read_text()) for rank in range(2)]
    assert len(errors[0]) == len(HYBRID) + len(TRANSFORMER)
    # Float32 sums in another order; objectives with the largest errors subtract nearly equal numbers.
    assert {name: error for found in errors for name, error in found.items() if error > 1e-4} == {}


@pytest.mark.timeout(1000)
def test_a_signal_to_one_rank_stops_both_and_the_run_resumes(folder: Path) -> None:
    for rank in range(2):
        assert (folder / f"stopped-error-{rank}.txt").read_text().startswith("Interrupted: stopped by ")
    # The signal came after step 2 was logged, so step 3 was finished.
    assert [event["step"] for event in events_of(folder / "stopped") if event["event"] == "resumed"] == [3]
    assert same(student_of(folder / "stopped"), student_of(folder / "whole"))


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(("run", "what"), [("other-mapping", "mapping file"), ("other-data", "data")])
def test_ranks_with_other_files_are_refused_with_both_fingerprints(folder: Path, run: str, what: str) -> None:
    messages = [(folder / f"{run}-error-{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"UsageError: the processes of this run differ in their {what}")
    prints = [part.split(": ")[1] for part in messages[0].split("found:")[1].splitlines()[0].split(", ")]
    assert len(set(prints)) == 2
    assert not (folder / run).exists()


@pytest.mark.timeout(1000)
def test_a_rank_that_fails_ends_both_with_its_message(folder: Path) -> None:
    messages = [(folder / f"broken-error-{rank}.txt").read_text() for rank in range(2)]
    assert messages[1].startswith("DataError: the disk of rank 1 is broken")
    assert messages[0].startswith("ProcessError: rank 1 of this run failed: the disk of rank 1 is broken")
    assert not (folder / "broken" / "run.lock").exists()
    assert not (folder / "broken" / "manifest.json").exists()
