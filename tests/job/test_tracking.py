"""Figures that TensorBoard and Weights & Biases write, read back from their files."""

from __future__ import annotations

import importlib
import json
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.errors import UsageError
from xarch_kd.job.tracking import tracked
from xarch_kd.job.train import train
from xarch_kd.testing.launch import in_a_fork
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import events_of

EVALUATED: dict[str, Any] = {**MIXER_STAGE, "steps": 2, "evaluation": {"every": 1, "batches": 1}}
# Of the log format of LevelDB, in which W&B writes: blocks, each record in one part or several.
BLOCK, HEADER, FULL, LAST = 32768, 7, 1, 4


def by_step(run: Path, kind: str, key: str) -> dict[int, float]:
    """Return a figure of a run's events by step."""
    return {
        event["step"]: event[key] for event in events_of(run) if event["event"] == kind and event["stage"] == "mixers"
    }


def test_tensorboard_holds_every_figure(write_mapping: Write, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(write_mapping(EVALUATED, tracking=["tensorboard"]), run)
    (file,) = (run / "stages" / "01-mixers").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()

    def scalars(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(tag)}

    for tag, kind, key in (
        ("train/loss", "step", "loss"),
        ("train/learning_rate", "step", "learning_rate"),
        ("train/grad_norm", "step", "gradient_norm"),
        ("eval/loss", "evaluation", "loss"),
        ("eval/nll", "evaluation", "nll"),
    ):
        assert scalars(tag) == pytest.approx(by_step(run, kind, key)), tag
    parts = {event["step"]: event["parts"]["mixer-output.1"] for event in events_of(run) if event["event"] == "step"}
    assert scalars("train/mixers/mixer-output.1") == pytest.approx(parts)
    parts = {
        event["step"]: event["parts"]["mixer-output.1"] for event in events_of(run) if event["event"] == "evaluation"
    }
    assert scalars("eval/mixers/mixer-output.1") == pytest.approx(parts)


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file of W&B."""
    at, record = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (FULL, LAST):
            yield record
            record = b""


# About 10 seconds: W&B takes most of them to be imported, here and in the run's own process, and to start its service.
def test_weights_and_biases_has_a_run_per_stage_in_the_run_folder(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    mapping = write_mapping(EVALUATED, {**LOGIT_STAGE, "steps": 1}, tracking=["wandb"])
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    # The module makes its classes when it is imported.
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    in_a_fork(train, mapping, run)
    assert not (tmp_path / "wandb").exists()

    history: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        name = ""
        for data in records(file.read_bytes()):
            record = messages.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                name = record.run.display_name
                assert (record.run.project, record.run.run_group) == ("xarch-kd", "run")
            if record.HasField("history"):
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                history.setdefault(name, []).append({key: json.loads(value) for key, value in items.items()})
    assert set(history) == {"run-mixers", "run-logits"}
    for key, kind, own in (
        ("train/loss", "step", "loss"),
        ("eval/loss", "evaluation", "loss"),
        ("eval/nll", "evaluation", "nll"),
    ):
        found = {line["train/global_step"]: line[key] for line in history["run-mixers"] if key in line}
        assert found == pytest.approx(by_step(run, kind, own)), key
    manifest = json.loads((run / "manifest.json").read_text())["files"]
    assert not [name for name in manifest if name.startswith("wandb")]


class Wandb(types.ModuleType):
    """A stand-in that records its calls."""

    def __init__(self, *, run: object = None, error: Exception | None = None) -> None:
        super().__init__("wandb")
        self.run, self.error = run, error
        self.calls: list[Any] = []

    def init(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(options["name"])

    def finish(self, *, exit_code: int) -> None:
        self.calls.append(exit_code)

    Settings = dict


def test_a_run_of_weights_and_biases_ends_with_its_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for stand_in, is_owner, expected in (
        (Wandb(), True, ["run-mixers", 0]),
        (Wandb(), False, []),
        (Wandb(run=object()), True, []),
    ):
        monkeypatch.setitem(sys.modules, "wandb", stand_in)
        with tracked(["wandb"], tmp_path / "run", "mixers", is_owner=is_owner):
            pass
        assert stand_in.calls == expected
    failing = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", failing)
    with pytest.raises(ValueError, match="in the stage"), tracked(["wandb"], tmp_path / "run", "m", is_owner=True):
        raise ValueError("in the stage")
    assert failing.calls == ["run-m", 1]


def test_without_a_login_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Wandb(error=RuntimeError("api_key not configured")))
    with pytest.raises(UsageError) as caught, tracked(["wandb"], tmp_path, "mixers", is_owner=True):
        pass
    assert caught.value.found == "api_key not configured"
    assert "WANDB_MODE=offline" in str(caught.value.fix)
