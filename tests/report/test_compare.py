"""Comparison of runs: paired differences, cost beside quality, and evaluations that are not alike."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.cli.app import main
from xarch_kd.errors import UsageError
from xarch_kd.report.compare import compare
from xarch_kd.testing.reports import WriteRun, likelihood, suite


def test_pairs_are_compared_on_the_same_rows_and_adjusted(write_run: WriteRun) -> None:
    first = write_run("first", {"likelihood": [likelihood(0.25)]})
    same = write_run("same", {"likelihood": [likelihood(0.25)]})
    worse = write_run("worse", {"likelihood": [likelihood(0.5)]})
    found = compare([first, same, worse])
    pairs = {(pair.first, pair.second): pair for pair in found.pairs}
    equal = pairs["first", "same"]
    assert (equal.value, equal.low, equal.high, equal.p_value, equal.is_real) == (0, 0, 0, 1, False)
    # Each row differs by 15 × 0.25 nats over 15 tokens, so that every resample has the same mean.
    other = pairs["first", "worse"]
    assert (other.value, other.low, other.high) == (pytest.approx(0.25), pytest.approx(0.25), pytest.approx(0.25))
    # 2 / 2001, adjusted for the two smaller of three.
    assert other.p_value == pytest.approx(2 / 2001) and other.adjusted == pytest.approx(6 / 2001)
    assert other.is_real


def test_cost_is_beside_quality_and_runs_are_sorted(write_run: WriteRun, plan_data: dict[str, Any]) -> None:
    first = write_run("a", {"likelihood": [likelihood(0.5)], "diversity": suite(samples=[])})
    second = write_run("b", {"likelihood": [likelihood(0.25)], "diversity": suite(samples=[])})
    found = compare([first, second])
    (stage,) = plan_data["stages"]
    run = found.runs[0].measures
    assert run["tokens"] == 2 * stage["tokens_per_step"] and run["flops"] == stage["flops"]
    assert (run["seconds"], run["peak_bytes"]) == (120.0, 3 << 20)
    assert (run["nll held-out"], run["nll difference held-out"], run["diversity distinct-2"]) == (2.5, 0.5, 0.5)
    assert [run.name for run in found.sorted_by("nll held-out").runs] == ["b", "a"]
    with pytest.raises(UsageError, match="Did you mean 'nll held-out'"):
        found.sorted_by("nll held-ou")
    rows = list(csv.DictReader(io.StringIO(found.as_csv())))
    assert [row["run"] for row in rows] == ["a", "b"] and float(rows[1]["nll held-out"]) == 2.25


def test_different_signatures_are_refused_with_the_fields(write_run: WriteRun) -> None:
    first = write_run("a", {"likelihood": [likelihood()], "diversity": suite()})
    second = write_run("b", {"likelihood": [likelihood(fingerprint="0" * 16)], "diversity": suite(signature="v2")})
    with pytest.raises(UsageError, match="not evaluated alike") as refused:
        compare([first, second])
    found = str(refused.value.found)
    assert (
        "likelihood, held-out" in found and "0000, 4 rows" in found and "diversity.v1" in found and "seed" not in found
    )
    with pytest.raises(UsageError, match=r"exposure: .*not measured"):
        compare([first, write_run("c", {"likelihood": [likelihood()], "diversity": suite(), "exposure": suite()})])
    with pytest.raises(UsageError, match="no evaluation") as missing:
        compare([first, write_run("d")])
    assert "xarch-kd evaluate" in str(missing.value.fix)
    with pytest.raises(UsageError, match="at least two different runs"):
        compare([first, first])
    old = likelihood()
    del old["row_nll"]
    with pytest.raises(UsageError, match="no values of its rows"):
        compare([write_run("e", {"likelihood": [old]}), write_run("f", {"likelihood": [old]})])


def test_commands_print_and_write_the_comparison(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_run(name, {"likelihood": [likelihood(value)]})) for name, value in (("a", 0.5), ("b", 0.25))]
    assert main(["compare", *runs, "--sort", "nll held-out", "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in stored["runs"]] == ["b", "a"] and stored["pairs"][0]["is_real"]
    assert main(["compare", *runs]) == 0
    printed = capsys.readouterr().out
    assert "may be chance" not in printed and "real" in printed and "2 min" in printed
    page = tmp_path / "compared.html"
    assert main(["report", *runs, "-o", str(page)]) == 0
    text = page.read_text()
    assert "1 of 1 paired differences are larger than chance explains." in text
    assert "b is better than a by 0.2500 nats per token" in text and "Loss of stage mixers by step" in text
    assert main(["report", *runs]) == 2 and "--output compared.html" in capsys.readouterr().err
