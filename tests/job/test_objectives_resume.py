"""Fitted constants and auxiliary parameters of a stage are kept: a stopped run resumes bitwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from xarch_kd.errors import Interrupted
from xarch_kd.job.calibrate import START_FILE
from xarch_kd.job.train import train
from xarch_kd.testing.mapping import Write
from xarch_kd.testing.runs import events_of, same, signal_after, student_of

STEPS = 6
STUDENT = {
    "model_type": "mamba2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "n_groups": 4,
    "state_size": 16,
    "expand": 2,
    "chunk_size": 16,
}
EVERYTHING: dict[str, Any] = {
    "name": "all",
    "steps": STEPS,
    "batches": 2,
    "train": ["all"],
    "cache": "memory",
    "gradient_accumulation": 2,
    "align": [
        {
            "name": "learned",
            "tap": "hidden",
            "layers": {"strategy": "learned", "final_temperature": 0.1},
            "loss": {"kind": "mse", "standardize": True, "weight": "auto"},
            "projector": {"kind": "orthogonal", "share": True},
        },
        {
            "name": "drawn",
            "tap": "mixer_output",
            "layers": {"strategy": "random", "redraw": 2},
            "loss": {"kind": "l2"},
            "schedule": {"kind": "cosine", "end": 0.5},
        },
        {
            "name": "heads",
            "tap": "mixing",
            "layers": [{"student": 0, "teacher": 1}],
            "loss": {"kind": "mixing", "heads": "assignment", "weight": 0.1},
        },
        {
            "name": "mixed",
            "tap": "mixing",
            "layers": [{"student": 1, "teacher": 3}],
            "loss": {"kind": "mixing", "heads": "learned", "weight": 0.1},
        },
    ],
    "tokens": {"divergence": "forward_kl"},
    "optimizer": {"lr": 1e-3, "projector_lr": 1e-2, "projector_weight_decay": 0.1},
}


Whole = Callable[[], Path]


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    """Folder of the undisturbed run, once it was made."""
    return {}


@pytest.fixture
def whole(write_mapping: Write, tmp_path_factory: pytest.TempPathFactory, kept: dict[str, Path]) -> Whole:
    """Return the run that is not stopped, made once."""

    def run() -> Path:
        if not kept:
            folder = tmp_path_factory.mktemp("whole") / "run"
            train(write_everything(write_mapping), folder)
            kept["run"] = folder
        return kept["run"]

    return run


def write_everything(write_mapping: Write) -> Path:
    return write_mapping(EVERYTHING, student={"config": STUDENT}, calibration={"tokens": 512})


# After the weights were balanced, and where layers are drawn anew.
@pytest.mark.parametrize("count", [1, 4])
def test_a_stopped_run_goes_on_to_the_same_student_and_the_same_maps(
    write_mapping: Write,
    tmp_path: Path,
    whole: Whole,
    count: int,
) -> None:
    mapping, expected = write_everything(write_mapping), whole()
    with signal_after(count), pytest.raises(Interrupted):
        train(mapping, tmp_path / "run")
    train(mapping, tmp_path / "run", resume=True)
    assert same(student_of(tmp_path / "run"), student_of(expected))
    for name in ("projectors.safetensors", "stages/01-all/trained.safetensors"):
        first, second = load_file(tmp_path / "run" / name), load_file(expected / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    balances = [json.loads((run / "stages/01-all/balance.json").read_text()) for run in (tmp_path / "run", expected)]
    assert balances[0] == balances[1]
    assert balances[0]["scales"]["learned"] != 1
    balanced = [event for event in events_of(tmp_path / "run") if event["event"] == "balanced"]
    assert len(balanced) == 1
    assert balanced[0]["scales"] == balances[0]["scales"]


def test_a_run_records_what_it_learned_and_what_it_was_fitted_to(whole: Whole) -> None:
    run = whole()
    start = load_file(run / "stages/01-all" / START_FILE)
    assert {name.split(".")[0] for name in start} == {"projectors", "maps", "fitted"}
    assert not any(name.startswith("student") for name in start)
    trained = load_file(run / "stages/01-all" / "trained.safetensors")
    assert torch.equal(trained["fitted.heads.0.heads"], start["fitted.heads.0.heads"])
    assert not torch.equal(trained["maps.learned.logits"], start["maps.learned.logits"])
    learned = next(event for event in events_of(run) if event["event"] == "layer-map")
    weights = torch.softmax(trained["maps.learned.logits"].double() / 0.1, 1)
    # Four decimals are written.
    torch.testing.assert_close(torch.tensor(learned["weights"]).double(), weights, rtol=0, atol=1e-4)
