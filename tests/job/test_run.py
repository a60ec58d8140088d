"""Runs from Python: what `train` accepts, the metrics of a run, and how runs, plans, traces and maps are shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
import yaml

import xarch_kd as xkd
from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.job.run import Run
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import events_of
from xarch_kd.testing.tiny import tiny_config, tiny_model

LINES = 30


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.fixture
def run(run_folder: Path, write_mapping: Write) -> Run:
    """A finished run of both stages, trained once, from a dict with tuples in it."""
    content = yaml.safe_load(
        write_mapping({**MIXER_STAGE, "align": tuple(MIXER_STAGE["align"])}, LOGIT_STAGE).read_text()
    )
    if run_folder.exists():
        return Run(run_folder)
    content["stages"] = tuple(content["stages"])
    content["evaluate"] = {"suites": ["likelihood", "long_range"], "tokens": 128}
    return xkd.train(content, str(run_folder))


def test_a_run_from_a_dict_carries_its_metrics(run: Run) -> None:
    steps = [event for event in events_of(run.path) if event["event"] == "step"]
    last = {stage: [event for event in steps if event["stage"] == stage][-1] for stage in ("mixers", "logits")}
    assert list(run.stages) == ["mixers", "logits"]
    for name, event in last.items():
        stage = run.stages[name]
        assert (stage.step, stage.steps, stage.loss, stage.parts) == (
            event["step"],
            event["step"],
            event["loss"],
            event["parts"],
        )
        assert stage.seconds is not None and stage.peak_bytes is not None
    measured = json.loads((run.path / "evaluation.json").read_text())["results"]
    result, figures = measured["likelihood"][0], measured["long_range"]["figures"]
    expected = {f"{name}/loss": event["loss"] for name, event in last.items()}
    expected |= {f"{name}/{part}": value for name, event in last.items() for part, value in event["parts"].items()}
    expected |= {
        "held-out/teacher": result["teacher_nll"],
        "held-out/student": result["student_nll"],
        "held-out/difference": result["difference"],
        **{f"long_range/{figure['name']}": figure["value"] for figure in figures if figure["value"] is not None},
    }
    assert "long_range/repeat copy" in expected
    assert run.metrics == expected
    assert run.is_finished and run.evaluation is not None
    assert run.seconds == sum(stage.seconds or 0 for stage in run.stages.values())
    assert Run(str(run.path)).metrics == run.metrics


def test_an_unfinished_run_can_be_opened(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    shutil.copytree(run.path, folder)
    (folder / "manifest.json").unlink()
    (folder / "evaluation.json").unlink()
    events = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    first = next(index for index, line in enumerate(events) if '"event": "step"' in line)
    # A line that was cut short when the process was killed.
    (folder / "events.jsonl").write_text("".join(events[: first + 1]) + events[first + 1][:20])
    opened = Run(folder)
    assert not opened.is_finished
    assert opened.evaluation is None and opened.seconds is None
    assert (opened.stages["mixers"].step, opened.stages["mixers"].seconds) == (1, None)
    assert (opened.stages["logits"].step, opened.stages["logits"].loss) == (0, None)
    assert "unfinished" in repr(opened)
    (folder / "plan.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"plan\.json is damaged"):
        _ = Run(folder).stages


def test_another_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        Run(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        Run(tmp_path / "nowhere")


@pytest.mark.parametrize("output", [None, 3, b"run"])
def test_an_output_that_is_no_path_is_refused(write_mapping: Write, output: Any) -> None:
    with pytest.raises(UsageError, match="The output is not a path"):
        xkd.train(write_mapping(), output)


def shown(value: Any, capsys: pytest.CaptureFixture[str]) -> tuple[str, str, str]:
    rich.print(value)
    return repr(value), capsys.readouterr().out, value._repr_html_()


def test_a_run_is_shown_with_its_losses_and_results(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for text in shown(run, capsys):
        assert f"{run.stages['mixers'].loss:.4g}" in text
        assert "held-out" in text
    assert len(repr(run).splitlines()) <= LINES


def test_a_plan_of_many_blocks_is_shown_in_few_lines_and_whole_in_a_notebook(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "a <b> & [red]"
    tiny_config("llama", num_hidden_layers=8).save_pretrained(teacher)
    entry = {"name": "stream", "tap": "hidden", "layers": "uniform"}
    mapping = {
        "version": 1,
        "teacher": {"model": teacher},
        "student": {"config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 6}},
        "data": {"builtin": "licences"},
        "stages": [{"name": f"stage-{index}", "steps": 1, "train": ["all"], "align": [entry]} for index in range(12)],
    }
    plan = xkd.plan(mapping)
    text, printed, page = shown(plan, capsys)
    assert len(text.splitlines()) <= LINES
    assert "stage-0" in text and "more lines: rich.print(plan)" in text
    assert "a <b> & [red]" in " ".join(text.split())
    for whole in (printed, page):
        assert "stream.5" in whole
        assert "uniform: student layers down, teacher layers across" in whole
    assert "<b>" not in page and "&lt;b&gt;" in page


def test_traces_mixings_and_layer_maps_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    traced = xkd.trace(model, torch.arange(6)[None], taps={"hidden": None, "mixing": [0, 2], "head_input": None})
    for text in shown(traced, capsys):
        assert "[1, 6, 64] float32" in text and "0-3" in text and "0, 2" in text and "SoftmaxMixing" in text
    mixing = traced["mixing"][2]
    assert repr(mixing).splitlines()[0] == "SoftmaxMixing: batch 1, time 6, heads 4, float32 on cpu"
    assert "query [1, 6, 4, 16]" in repr(mixing) and "query [1, 6, 4, 16]" in mixing._repr_html_()
    layer_map = xkd.LayerMap("a <b> [red]", torch.eye(50))
    text, printed, page = shown(layer_map, capsys)
    assert len(text.splitlines()) == LINES and "23 more lines" in text
    assert printed.splitlines()[0].startswith("a <b> [red]") and len(printed.splitlines()) == 52
    assert "a &lt;b&gt; [red]" in page and page.count("█") == 50
