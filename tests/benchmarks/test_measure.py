"""Contenders in processes of their own, and peak memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers, worker
from benchmarks.case import Case, Contender, Options, Run
from benchmarks.cases.projected_distance import CASES
from benchmarks.measure import Checkout, Remote, Settings, measure
from benchmarks.memory import peak_over
from benchmarks.session import Session, one_line, unsupported_reason, without_paths

ASKED: dict[str, Any] = {"threads": 1}


def checkout(folder: Path, worker: str) -> Checkout:
    """A checkout whose worker is the given code."""
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "__init__.py").touch()
    (folder / "benchmarks" / "worker.py").write_text(worker)
    return Checkout(root=folder, path=(folder,))


def test_contenders_run_in_processes_of_their_own() -> None:
    case: Case = CASES[0]
    # Workers have the contenders of their checkout alone.
    case = dataclasses.replace(case, contenders={**case.contenders, "no such": case.contenders["naive"]})
    found, rates = measure(case, ["streaming", "no such"], Settings(repeats=2, quick=True))
    assert len(rates) == 2
    assert all(one["flops"] > 0 and one["bandwidth"] > 0 for one in rates)
    one = found["streaming"]
    assert one.missing is None
    assert len(one.seconds) == 2
    assert one.memory is not None and one.memory["peak_bytes"] >= 0
    assert one.errors is not None and set(one.errors["gradients"]) == {"student", "weight"}
    # Reported, not raised.
    assert found["no such"].missing == "KeyError: 'no such'"


def test_a_contender_of_a_gpu_is_missing_without_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert Session(CASES[0], "fused", device="cpu", quick=True).prepare() == "needs a GPU"


def test_a_worker_refuses_the_package_of_another_checkout() -> None:
    asked = {"operation": "projected_distance", "case": CASES[0].name, "contender": "naive", "root": "nowhere"}
    with pytest.raises(ImportError, match="not that of the requested revision"):
        worker.begin({**asked, "device": "cpu", "quick": True, "threads": torch.get_num_threads()})


def test_a_process_that_dies_is_reported(tmp_path: Path) -> None:
    one = Remote(ASKED, checkout(tmp_path, "raise SystemExit(3)"), 60.0)
    try:
        assert one.begin() == {"failed": "its process ended with code 3"}
    finally:
        one.close()


def test_a_process_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    one = Remote(ASKED, checkout(tmp_path, "import time; time.sleep(600)"), 0.2)
    assert one.begin() == {"failed": "no answer within 0 s"}
    assert one.process.poll() is not None


def test_threads_and_import_path_reach_the_worker(tmp_path: Path) -> None:
    code = "import json, os; input(); print(json.dumps({'answer': [os.environ['OMP_NUM_THREADS'], __file__]}))"
    one = Remote({"threads": 7}, checkout(tmp_path, code), 60.0)
    try:
        assert one.begin() == ["7", str(tmp_path / "benchmarks" / "worker.py")]
    finally:
        one.close()


def test_the_peak_is_what_was_held_at_once() -> None:
    size = 64 << 20

    def compute() -> None:
        for _ in range(3):
            torch.ones(size // 4)

    # The smallest of several: the size of the process includes what its other threads and the kernel hold meanwhile.
    measured = [peak_over(compute, "cpu") for _ in range(4)]
    peak = min(peak for peak, _ in measured)
    # One of the three at a time; the growth of ru_maxrss may hide all of it.
    assert peak < 1.5 * size
    if measured[0][1].startswith("resident"):
        assert peak > 0.9 * size


def test_the_error_of_a_wrong_contender_is_seen() -> None:
    def wrong(options: Options) -> Run:
        right = CASES[0].contenders["naive"].make(options)
        # Three times the value, and gradients of the value doubled once more.
        return lambda inputs: 6 * right(inputs) - 3 * right(inputs).detach()

    contenders = {
        "naive": CASES[0].contenders["naive"],
        "wrong": Contender(make=wrong, source="made up"),
        "itself": Contender(make=wrong, source="made up", truth="wrong"),
    }
    case = dataclasses.replace(CASES[0], contenders=contenders)
    for name, value, gradient in (("wrong", 2.0, 5.0), ("itself", 0.0, 0.0)):
        session = Session(case, name, device="cpu", quick=True)
        assert session.prepare() is None
        errors = session.errors()
        assert errors is not None
        # Rounding of float32, some ten times over.
        assert errors["value"] == pytest.approx(value, abs=1e-5)
        assert errors["gradients"] == pytest.approx({"student": gradient, "weight": gradient}, abs=1e-5)


def test_what_is_too_large_is_left_out() -> None:
    large = dataclasses.replace(CASES[0].contenders["naive"], largest={"tokens": 100})
    assert unsupported_reason(large, {"tokens": 100}, "cpu") is None
    assert unsupported_reason(large, {"tokens": 101}, "cpu") == "left out above tokens = 100: too large or too slow"


def test_errors_are_said_without_paths() -> None:
    text = one_line(FileNotFoundError("no /some/where/file.txt here\nsecond line"))
    assert text == "FileNotFoundError: no … here"
    assert without_paths("seconds/token stays") == "seconds/token stays"


@pytest.mark.parametrize("name", list(peers.REQUIREMENTS))
def test_a_requirement_that_is_absent_has_a_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    reason = peers.REQUIREMENTS[name]("cpu")
    assert reason is not None and ("installed" in reason or "needs" in reason)


def test_loading_trl_leaves_its_trainers_as_they_were() -> None:
    import sys

    pytest.importorskip("trl")
    before = sys.modules.get("trl.trainer.utils")
    reason = peers.REQUIREMENTS["trl chunked"]("cpu")
    assert sys.modules.get("trl.trainer.utils") is before
    assert reason is None or reason.startswith("this release of trl")
