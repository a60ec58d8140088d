"""Command `benchmarks.run`: smoke runs of each operation, stored files, tables and plots from a stored file alone."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run, tables
from benchmarks.cases import CASES
from benchmarks.measure import Checkout

ROOT = Path(__file__).resolve().parents[2]
# Values and gradients of at most a few hundred terms: some ten roundings survive, and cancellation costs a few bits.
# The dense computation in bfloat16 rounds its logits: a few units.
TOLERANCE = {"float32": 64 * torch.finfo(torch.float32).eps, "bfloat16": 4 * torch.finfo(torch.bfloat16).eps}
QUICK = ("--quick", "--threads", "1")
REASONS = ("needs a GPU", "not installed", "does not load", "left out", "cannot run as", "this release of trl")


def first_of_each_group(operation: str) -> list[str]:
    groups = {case.group: case.name for case in reversed(CASES[operation])}
    return [option for name in groups.values() for option in ("--case", name)]


def smoke(operation: str, output: Path, *more: str) -> dict[str, Any]:
    code = run.main([*QUICK, "--op", operation, "--output", str(output), *first_of_each_group(operation), *more])
    assert code == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("operation", list(CASES))
def test_a_smoke_run_measures_everything_and_stores_it(operation: str, tmp_path: Path) -> None:
    result = smoke(operation, tmp_path / "result.json")
    assert result["operation"] == operation
    assert {case["group"] for case in result["cases"]} == {case.group for case in CASES[operation]}
    for case in result["cases"]:
        measured = {name: one for name, one in case["contenders"].items() if "seconds" in one}
        missing = {name: one["missing"] for name, one in case["contenders"].items() if "seconds" not in one}
        assert case["baseline"] in measured
        assert {name: why for name, why in missing.items() if not any(part in why for part in REASONS)} == {}
        for name, one in measured.items():
            assert one["seconds"]["low"] <= one["seconds"]["median"] <= one["seconds"]["high"]
            assert (one["errors"] is None) == (case["whole"] is not None)
            if one["errors"] is None:
                continue
            errors = [one["errors"]["value"], *one["errors"]["gradients"].values()]
            # The error of random probes is that of an estimate, not of rounding.
            allowed = math.inf if name == "sketch" else TOLERANCE[case["dtype"]]
            assert all(math.isfinite(error) and error <= allowed for error in errors), (case["case"], name, errors)
    page = (tmp_path / "result.md").read_text()
    assert "smoke run" in page
    assert all(f"## {case['case']}" in page for case in result["cases"])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of a smoke run of one contender beside the baseline."""
    path = tmp_path_factory.mktemp("smoke") / "result.json"
    smoke("similarity", path, "--contender", "streaming")
    return path


def test_a_result_is_stamped_and_names_no_host_or_folder(stored: Path) -> None:
    text = stored.read_text()
    result = json.loads(text)
    stamp = result["stamp"]
    assert set(stamp) == {
        *("time", "revision", "python", "versions", "system", "device", "processors", "threads"),
    }
    assert stamp["versions"]["torch"] == torch.__version__
    assert set(result["cases"][0]["contenders"]) == {"naive", "streaming"}
    assert str(ROOT) not in text and str(stored.parent) not in text
    assert len(platform.node()) < 4 or platform.node() not in text


def test_tables_are_made_from_the_file_alone(stored: Path) -> None:
    page = stored.with_suffix(".md").read_text()
    stored.with_suffix(".md").unlink()
    tables.main([str(stored)])
    assert stored.with_suffix(".md").read_text() == page


def test_a_bound_shows_whether_it_is_met() -> None:
    bound = {"contender": "streaming", "measure": "time", "against": "naive", "at_most": 0.8, "at_least": None}
    met = tables.bound_row({**bound, "measured": 0.75, "met": True, "why": None})
    assert met == "| streaming: time ÷ naive | ≤ 0.8 | 0.750 | yes |"
    assert tables.bound_row({**bound, "measured": 0.9, "met": False, "why": None}).endswith("| 0.900 | no |")
    absent = tables.bound_row({**bound, "measured": None, "met": None, "why": "naive: not installed"})
    assert absent.endswith("| naive: not installed | not measured |")


def test_stored_results_are_replaced_only_by_whole_runs(tmp_path: Path) -> None:
    def asked(*options: str) -> argparse.Namespace:
        return run.parser_of_arguments().parse_args(list(options))

    assert run.where("similarity", asked()) == ROOT / "benchmarks" / "results" / "similarity-cpu.json"
    for part in (["--quick"], ["--case", "x"], ["--contender", "x"], ["--against", "HEAD"]):
        assert run.where("similarity", asked(*part)) is None
        assert run.where("similarity", asked(*part, "--output", str(tmp_path / "x"))) == tmp_path / "x"


@pytest.mark.parametrize(
    "options",
    [
        ["--case", "no such case"],
        ["--output", "x.json"],
        ["--op", "similarity", "--against", "no-such-revision"],
        ["--op", "no_such_operation"],
    ],
)
def test_a_question_without_an_answer_is_an_error(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main([*QUICK, *options])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_gate_fails_on_a_missed_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(met: bool | None) -> dict[str, Any]:
        bound = {"contender": "streaming", "measure": "time", "at_most": 1.0, "met": met}
        return {"operation": "similarity", "cases": [{"bounds": [bound]}], "growths": []}

    monkeypatch.setattr(run, "write", lambda result, path: None)
    for met, code in ((False, 1), (True, 0), (None, 0)):
        monkeypatch.setattr(run, "measure_operation", lambda *_, met=met: measured(met))
        assert run.main(["--op", "similarity", "--gate"]) == code
        assert run.main(["--op", "similarity"]) == 0


def test_another_revision_is_measured_in_processes_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def measured(operation: str, cases: Any, settings: Any, options: Any, stamp: Any, checkouts: Any) -> dict[str, Any]:
        asked.append((settings.isolated, stamp["against"], [checkout.suffix for checkout in checkouts]))
        return {"operation": operation, "cases": [], "growths": []}

    monkeypatch.setattr(run, "commit_of", lambda reference: "0123456789ab")
    monkeypatch.setattr(run, "checked_out", lambda reference: contextlib.nullcontext(Checkout(suffix=" @ before")))
    monkeypatch.setattr(run, "measure_operation", measured)
    assert run.main([*QUICK, "--op", "similarity", "--against", "HEAD~1"]) == 0
    # In one process both would be the package of this checkout.
    assert asked == [(True, "0123456789ab", ["", " @ before"])]


def test_stored_results_of_the_checkout_render() -> None:
    for path in tables.stored():
        result = json.loads(path.read_text())
        assert path.with_suffix(".md").read_text().startswith(f"# {result['operation']} on")
        assert result["stamp"]["revision"]["commit"]
        assert not result["settings"]["quick"]


def test_plots_are_drawn_alike_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib.pyplot", exc_type=ImportError)
    from benchmarks.plots import draw

    smoke("similarity", tmp_path / "a.json", "--case", "cka*", "--contender", "streaming")
    result = json.loads((tmp_path / "a.json").read_text())
    for case, tokens in zip(result["cases"], (8, 16, 32), strict=True):
        case["sizes"]["tokens"] = tokens
    (name,) = draw(result, tmp_path / "a.json")
    first = (tmp_path / name).read_bytes()
    assert draw(result, tmp_path / "a.json") == [name]
    assert (tmp_path / name).read_bytes() == first
    assert len(first) < 200_000


def test_the_command_line_starts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["benchmarks.run", *QUICK, "--op", "similarity", "--case", "cka*", "--contender", "reference"]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(run.__file__, run_name="__main__")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "| naive |" in shown
    assert "Not stored" in shown
