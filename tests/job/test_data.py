"""Text of a run: packing, mixtures, and where held-out text comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.job.test_train import END_TO_END
from tests.training.test_micro_batches import run, total
from xarch_kd.cli.app import main
from xarch_kd.data.batches import Batch
from xarch_kd.data.packing import PackedRows
from xarch_kd.data.rows import BatchOrder
from xarch_kd.errors import DataError, Interrupted, MappingFileError
from xarch_kd.job.evaluate import evaluate
from xarch_kd.job.models import load_models, load_run_tokenizer
from xarch_kd.job.texts import RunText, evaluation_texts, run_text
from xarch_kd.job.train import train
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.progress import StageProgress, StepFigures
from xarch_kd.run.report import Reporter
from xarch_kd.testing.mapping import LOGIT_STAGE, Write
from xarch_kd.testing.runs import events_of, same, signal_after, student_of
from xarch_kd.training.aligner import Aligner


def _lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def _data(*files: str, **more: Any) -> dict[str, Any]:
    return {"files": list(files), "sequence_length": 16, "batch_size": 2, **more}


def _text(mapping: Path) -> RunText:
    plan = make_plan(mapping)
    return run_text(plan, load_run_tokenizer(plan), Reporter.silent())


# Every test that names no packing is of "wrapped".
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_rows_packed_each_way_train_and_are_measured(write_mapping: Write, tmp_path: Path, packing: str) -> None:
    file = _lines(tmp_path / "t.jsonl", [f"document {number} " + "word " * (number % 7) for number in range(60)])
    mapping = write_mapping(
        LOGIT_STAGE, data=_data(file, packing=packing), evaluate={"suites": ["likelihood"], "tokens": 64}
    )
    train(mapping, tmp_path / "run")
    losses = [event["loss"] for event in events_of(tmp_path / "run") if event["event"] == "step"]
    assert len(losses) == LOGIT_STAGE["steps"] and all(loss > 0 for loss in losses)
    (figures,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]["likelihood"]
    assert figures["student_nll"] > 0 and figures["tokens"] > 30


@pytest.mark.parametrize("student", ["recurrent", "attention"])
def test_a_step_on_isolated_documents_is_that_of_documents_alone(
    write_mapping: Write, tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, student: str
) -> None:
    """Through the trainer, with two micro-batches a step, against a pass per document."""
    file = _lines(tmp_path / "t.jsonl", [f"{number}: " + "word " * (number % 5) for number in range(60)])
    data = _data(file, packing="best_fit", documents="isolated", sequence_length=32, held_out=0)
    stage = {**END_TO_END, "steps": 1, "gradient_accumulation": 2}
    changes: dict[str, Any] = {}
    if student == "attention":
        changes = {"student": {"model": str(teacher_folder)}}
        stage |= {
            "train": ["all"],
            "align": [{"name": "stream", "tap": "hidden", "layers": [{"student": 1, "teacher": 2}]}],
        }
    mapping = write_mapping(stage, data=data, **changes)
    steps: list[StepFigures] = []
    monkeypatch.setattr(StageProgress, "step", lambda self, figures: steps.append(figures))
    train(mapping, tmp_path / "run")
    plan = make_plan(mapping)
    tokenizer = load_run_tokenizer(plan)
    models = load_models(plan, tokenizer, Reporter.silent())
    aligner = Aligner(plan, teacher=models.teacher, student=models.student)
    rows = run_text(plan, tokenizer, Reporter.silent()).training
    assert isinstance(rows, PackedRows)
    order = BatchOrder.of(rows, batch_size=2, distinct=2, seed=0, stage=0)
    drawn = [rows.row(row) for batch in range(2) for row in order.rows(batch)]
    alone = [
        Batch(input_ids=torch.from_numpy(piece)[None])
        for row in drawn
        for piece in numpy.split(row.ids, (row.positions == 0).nonzero()[0][1:])
    ]
    assert len(alone) > len(drawn) and (aligner.splitting_reason is None) == (student == "attention")
    outputs, _ = run(aligner, alone)
    assert steps[0].loss == pytest.approx(total(outputs), rel=1e-5)
    # What is shown as tokens per second counts tokens alone, not padding.
    assert steps[0].tokens == sum(len(row.ids) for row in drawn)


def test_copies_of_one_document_are_trained_on_and_cannot_be_measured(write_mapping: Write, tmp_path: Path) -> None:
    file = _lines(tmp_path / "t.jsonl", ["always the same line of text"] * 100)
    assert train(write_mapping(LOGIT_STAGE, data=_data(file)), tmp_path / "run").is_finished
    mapping = write_mapping(LOGIT_STAGE, data=_data(file), evaluate={"suites": ["likelihood"], "tokens": 64})
    with pytest.raises(DataError, match=r"no held-out text to measure on[\s\S]*data.evaluation"):
        _text(mapping).held_out()


def test_other_text_can_be_named_to_measure_on(write_mapping: Write, tmp_path: Path) -> None:
    training = _lines(tmp_path / "t.jsonl", [f"training line {number}" for number in range(50)])
    other = _lines(tmp_path / "o.jsonl", ["quite another text" for _ in range(20)])
    mapping = write_mapping(
        LOGIT_STAGE,
        data=_data(training, evaluation={"files": [other]}),
        evaluate={"suites": ["likelihood"], "tokens": 64},
    )
    plan = make_plan(mapping)
    tokenizer = load_run_tokenizer(plan)
    text = run_text(plan, tokenizer, Reporter.silent())
    # Nothing of the training text is held out.
    documents = sum(len(tokenizer(f"training line {number}")["input_ids"]) + 1 for number in range(50))
    assert text.training.tokens == documents // 16 * 16
    texts, descriptions = evaluation_texts(plan, tokenizer, Reporter.silent(), text)
    assert "quite another text" in tokenizer.decode(texts["held-out"][0].input_ids.flatten())
    assert "o.jsonl" in descriptions["held-out"]
    assert "warning" not in "".join(text.lines)
    same = write_mapping(
        LOGIT_STAGE,
        data=_data(training, evaluation={"files": [training]}),
        evaluate={"suites": ["likelihood"], "tokens": 64},
    )
    assert "50 of 50 documents of data.evaluation are in the training text too" in _text(same).lines[-1]


def test_the_seed_decides_what_is_held_out_and_0_holds_out_nothing(write_mapping: Write, tmp_path: Path) -> None:
    file = _lines(tmp_path / "t.jsonl", [f"line {number}" for number in range(100)])
    found = [_text(write_mapping(data=_data(file, held_out=0.3), seed=seed)) for seed in (0, 0, 1)]
    prints = [text.held_out_fingerprint for text in found]
    assert prints[0] == prints[1] != prints[2]
    assert _text(write_mapping(data=_data(file, held_out=0))).held_out_documents == ()


def test_a_streamed_dataset_is_trained_on_measured_and_resumed(write_mapping: Write, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    _lines(folder / "train.jsonl", [f"document {number} " + "word " * (number % 7) for number in range(300)])
    data = {"dataset": str(folder), "streaming": True, "sequence_length": 16, "batch_size": 2}
    mapping = write_mapping(
        LOGIT_STAGE, data=data, evaluate={"suites": ["likelihood"], "tokens": 64}, calibration={"tokens": 64}
    )
    train(mapping, tmp_path / "whole")
    (figures,) = json.loads((tmp_path / "whole" / "evaluation.json").read_text())["results"]["likelihood"]
    assert figures["student_nll"] > 0 and 30 < figures["tokens"] <= 64
    more = evaluate(tmp_path / "whole", suites=["likelihood"], tokens=128, console=Console(quiet=True))
    assert 64 < more.result("held-out").tokens <= 128
    with signal_after(2), pytest.raises(Interrupted):
        train(mapping, tmp_path / "stopped")
    train(mapping, tmp_path / "stopped", resume=True)
    assert same(student_of(tmp_path / "stopped"), student_of(tmp_path / "whole"))


def test_a_mixture_is_drawn_by_weight_and_counted(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [_lines(tmp_path / f"{name}.jsonl", [f"{name} {number}" * 4 for number in range(40)]) for name in "ab"]
    sources = [{"files": [file], "weight": weight} for file, weight in zip(files, (3.0, 1.0), strict=True)]
    data = {"mixture": sources, "sequence_length": 16, "batch_size": 2}
    mapping = write_mapping(
        {**LOGIT_STAGE, "steps": 20, "checkpoint_every": 20},
        data=data,
        evaluate={"suites": ["likelihood"], "tokens": 128},
    )
    assert main(["train", str(mapping), "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    counts = [
        int(line.split(": ")[1].split(" rows")[0]) for line in printed.splitlines() if " of the stage's rows" in line
    ]
    assert sum(counts) == 40 and 22 <= counts[0] <= 38
    held_out = _text(mapping).held_out()
    assert held_out.weights == (3.0, 1.0)
    assert ", ".join(files) in (tmp_path / "run" / "student" / "README.md").read_text()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"mixture": [{"files": ["a"], "weight": 1}, {"files": ["b"], "weight": 0}]}, r"data\.mixture\[1\]\.weight"),
        ({"mixture": [{"files": ["a"], "weight": -2}]}, r"data\.mixture\[0\]\.weight"),
        ({"mixture": []}, r"data\.mixture"),
        ({"mixture": [{"files": ["a"], "weight": 1}], "files": ["b"]}, "exactly one of builtin"),
        ({"mixture": [{"files": ["a"], "weight": 1}], "column": "body"}, "column: move it there"),
        ({"dataset": "a", "streaming": True}, "streamed rows cannot be drawn again: leave out batches of stage mixers"),
        ({"dataset": "a", "streaming": True, "held_out": 0.5, "evaluation": {"files": ["b"]}}, "give one of them"),
        ({"files": ["a"], "held_out": 0.1, "evaluation": {"files": ["b"]}}, "give one of them"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(
    write_mapping: Write, data: dict[str, Any], words: str
) -> None:
    with pytest.raises(MappingFileError, match=words):
        make_plan(write_mapping(data=data))


def test_epochs_of_a_stream_are_refused(write_mapping: Write) -> None:
    stage = {name: value for name, value in LOGIT_STAGE.items() if name != "steps"} | {"epochs": 1}
    with pytest.raises(
        MappingFileError, match="the length of a stream is not known: give steps, not epochs, to logits"
    ):
        make_plan(write_mapping(stage, data={"dataset": "a", "streaming": True}))


def test_an_empty_source_of_a_mixture_is_refused_by_name(write_mapping: Write, tmp_path: Path) -> None:
    full = _lines(tmp_path / "full.jsonl", [f"line {number}" for number in range(50)])
    (tmp_path / "empty.txt").write_text("  ")
    sources = [{"files": [full], "weight": 1}, {"files": [str(tmp_path / "empty.txt")], "weight": 1}]
    with pytest.raises(DataError, match=r"empty\.txt"):
        _text(write_mapping(data={"mixture": sources, "sequence_length": 16}))
    (tmp_path / "empty.txt").write_text("short")
    with pytest.raises(DataError, match=r"empty\.txt[\s\S]*too short for one row"):
        _text(write_mapping(data={"mixture": sources, "sequence_length": 16, "held_out": 0}))


def test_completions_alone_are_measured(write_mapping: Write, tmp_path: Path) -> None:
    """Labels from the file to the figures, against logits of the saved student, a document at a time."""
    pairs = [(f"question {number}? ", "answer " + "no " * (number % 4)) for number in range(12)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "completion": end}) + "\n" for prompt, end in pairs))
    data = _data(
        str(file), packing="best_fit", documents="isolated", sequence_length=64, evaluation={"files": [str(file)]}
    )
    stage = {**LOGIT_STAGE, "align": [{**END_TO_END["align"][0], "tokens": "labelled"}]}
    run = train(write_mapping(stage, data=data, evaluate={"suites": ["likelihood"], "tokens": 4096}), tmp_path / "run")
    (figures,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]["likelihood"]
    tokenizer, student = AutoTokenizer.from_pretrained(run.student), AutoModelForCausalLM.from_pretrained(run.student)
    values: list[float] = []
    for prompt, end in pairs:
        ids = [*tokenizer(prompt + end, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        first = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = student(torch.tensor([ids])).logits[0]
        nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        values += nll[first - 1 :].tolist()
    assert figures["tokens"] == len(values)
    assert figures["student_nll"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_a_stream_without_a_held_out_document_is_refused_before_training(write_mapping: Write, tmp_path: Path) -> None:
    file = _lines(tmp_path / "t.jsonl", ["word " * 40])
    mapping = write_mapping(LOGIT_STAGE, data=_data(file, streaming=True, held_out=0.001))
    with pytest.raises(DataError, match=r"no document of .* is held out\n  found:   1 documents in a whole pass"):
        train(mapping, tmp_path / "run")
    assert not (tmp_path / "run").exists()
