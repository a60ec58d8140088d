"""Stages whose prefixes are sampled: sources, resumption, two ranks, refusals and collapse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xarch_kd.cli.app import main
from xarch_kd.errors import Interrupted, MappingFileError, UsageError
from xarch_kd.job.prefixes import end_tokens
from xarch_kd.job.train import train
from xarch_kd.mapping_file.prefixes import Prefixes, prefix_settings
from xarch_kd.planning.resolve import make_plan
from xarch_kd.teacher.reader import TeacherFeatures
from xarch_kd.testing.mapping import LOGIT_STAGE, Write
from xarch_kd.testing.runs import events_of, same, signal_after, student_of
from xarch_kd.testing.tiny import tiny_model
from xarch_kd.training.aligner import Aligner

MIXED: dict[str, Any] = {
    **LOGIT_STAGE,
    "steps": 6,
    "prefixes": {
        "data": 0.3,
        "student": {"share": 0.5, "temperature": 0.9, "top_k": 50},
        "teacher": {"share": 0.2, "top_p": 0.9},
        "prompt_tokens": 4,
        "replay": {"capacity": 4, "fresh": 0.5},
        "horizon": {"initial": 0.5},
    },
}


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [event for event in events_of(run) if event["event"] == "step"]


def test_a_mixture_is_resumed_from_its_buffer_bitwise(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = write_mapping(MIXED)
    assert main(["train", str(mapping), "--output", str(tmp_path / "whole")]) == 0
    assert "student " in (printed := capsys.readouterr().out) and "distinct-4" in printed
    whole = steps_of(tmp_path / "whole")
    drawn = [event["prefixes"]["batches"] for event in whole]
    for name, share in (("data", 0.3), ("student", 0.5), ("teacher", 0.2)):
        assert abs(sum(batches[name] for batches in drawn) - 6 * share) < 1
    assert sum(event["prefixes"]["replayed"] for event in whole) > 0
    with signal_after(4), pytest.raises(Interrupted):
        train(mapping, tmp_path / "stopped")
    train(mapping, tmp_path / "stopped", resume=True)
    assert same(student_of(tmp_path / "stopped"), student_of(tmp_path / "whole"))
    figures = [(event["loss"], event["prefixes"]["batches"]) for event in steps_of(tmp_path / "stopped")]
    assert figures == [(event["loss"], event["prefixes"]["batches"]) for event in whole]


def test_hidden_states_are_matched_on_the_same_sampled_rows(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {
        **LOGIT_STAGE,
        "steps": 1,
        "prefixes": "on_policy",
        "align": [{"name": "stream", "tap": "hidden", "layers": "replaced", "loss": {"kind": "mse"}}],
    }
    read: list[str] = []
    seen: list[str] = []
    original, forward = TeacherFeatures.read, Aligner.forward
    monkeypatch.setattr(
        TeacherFeatures,
        "read",
        lambda self, batch, **more: read.append(batch.fingerprint) or original(self, batch, **more),
    )
    monkeypatch.setattr(
        Aligner, "forward", lambda self, **given: seen.append(given["batch"].fingerprint) or forward(self, **given)
    )
    run = train(write_mapping(stage), tmp_path / "run")
    assert read[-1] == seen[-1]
    (step,) = steps_of(tmp_path / "run")
    assert step["prefixes"]["batches"]["student"] == 1 and step["prefixes"]["student"]["mean_length"] > 0
    assert set(step["parts"]) > {"stream.1", "stream.2"}
    assert run.is_finished


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefixes": {"data": 0.5, "student": 0.3}}, ["must sum to 1", "0.5 + 0.3 + 0 = 0.8"]),
        ({"prefixes": {"student": {"share": 1, "top_k": 0}}}, ["top_k: must be at least 1"]),
        ({"prefixes": {"student": {"share": 1, "top_p": 0}}}, ["top_p: must be greater than 0"]),
        ({"prefixes": "gdk"}, ["Did you mean 'gkd'?"]),
        ({"prefixes": {"student": 1, "prompt_tokens": 16}}, ["a prompt of 16 tokens leaves nothing to continue"]),
        (
            {"prefixes": {"student": {"share": 1, "max_new_tokens": 100000}}},
            ["the teacher has 512 positions", "the student has 512 positions", "student.max_new_tokens"],
        ),
        ({"prefixes": "gkd", "cache": "memory", "batches": 2}, ["sampled prefixes are new in each step", "cache: off"]),
        ({"prefixes": "distillm"}, ["adaptive follows evaluations", "evaluation: {every: 50}"]),
        ({"prefixes": {"student": 1, "replay": {"capacity": 1}}}, ["must hold the rows of a micro-batch, 2"]),
        ({"prefixes": {"teacher": 1, "replay": {}}}, ["it samples none"]),
    ],
    ids=["sum", "top-k", "top-p", "preset", "prompt", "positions", "cache", "adaptive", "capacity", "replay"],
)
def test_settings_that_cannot_work_are_refused_before_a_weight_is_read(
    write_mapping: Write, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(MappingFileError) as error:
        make_plan(write_mapping({**LOGIT_STAGE, **changes}))
    for word in words:
        assert word in str(error.value)


def test_models_that_end_a_text_differently_are_refused_unless_the_stage_names_the_token() -> None:
    teacher, student = tiny_model("llama"), tiny_model("mamba2", eos_token_id=5)
    with pytest.raises(UsageError, match=r"ids 0 of the teacher and 5 of the student") as error:
        end_tokens(prefix_settings("gkd"), teacher, student, stage="mixed")
    assert "prefixes: {end_of_sequence: [0, 5]}" in str(error.value)
    named = Prefixes.model_validate({"preset": "gkd", "end_of_sequence": (5, 0)})
    assert end_tokens(named, teacher, student, stage="mixed") == (0, 5)
    outside = Prefixes.model_validate({"preset": "gkd", "end_of_sequence": (97,)})
    with pytest.raises(UsageError, match="0 to 96"):
        end_tokens(outside, teacher, student, stage="mixed")
