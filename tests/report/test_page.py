"""Report of a run: its verdict, what it shows of hostile text, and runs without an evaluation."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.report.content import Folded
from xarch_kd.report.page import write_report
from xarch_kd.report.read import read_run
from xarch_kd.report.suites import suite_sections
from xarch_kd.report.verdict import verdict_of
from xarch_kd.testing.reports import HOSTILE, WriteRun, likelihood, suite


class Page(HTMLParser):
    """Elements of a page, its text, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_hostile_text_is_shown_as_text_and_nothing_is_loaded(write_run: WriteRun) -> None:
    run = write_run(results={"likelihood": [likelihood()], "diversity": suite()})
    path = write_report(run)
    listed = json.loads((run / "manifest.json").read_text())["files"]
    assert path == run / "report.html" and "report.html" in listed and "events.jsonl" in listed
    text = path.read_text()
    page = Page(text)
    shown = "".join(page.text)
    assert "\x00" not in text and "\x1b" not in text and "\u202e" not in text
    assert {tag for tag, _ in page.elements} & {"script", "img", "iframe", "object", "base", "form"} == set()
    for sample in HOSTILE[:2]:
        assert shown.count(sample) == 3
    assert shown.count(r"before\x00after\x1b[31m") == 3 and "שלום \\u202e reversed" in shown
    addresses = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href") and value is not None
    ]
    assert addresses and [found for found in addresses if not found.startswith(("#", "data:"))] == []
    assert "url(http" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "ids of figures do not meet"
    known = {f"#{name}" for name in ids}
    assert [found for found in addresses if found.startswith("#") and found not in known] == []
    assert len(page.all("svg")) >= 5
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in page.all("svg"))
    # Colors are those of the page, in both schemes.
    assert re.search(r"stroke: var\(--student\)", text) and "prefers-color-scheme: dark" in text


def test_verdict_names_what_was_lost_where_and_what_was_gained(write_run: WriteRun) -> None:
    details = suite(figures=[suite()["figures"][0] | {"name": "agreement", "low": 0.7, "high": 1.2}])
    results = {
        "likelihood": [
            likelihood(0.25) | {"details": details},
            likelihood(0.0625, text="other"),
            likelihood(-0.5, text="third"),
        ],
        "diversity": suite(),
    }
    verdict = verdict_of(read_run(write_run(results=results)))
    assert verdict.headline.startswith("The student loses 0.250 nats per token on held-out")
    assert "1 other measure is below the teacher's" in verdict.headline
    lost, diversity = verdict.lost
    assert "+0.250 nats per token (interval +0.125 to +0.375)" in lost
    # exp(-0.25) of the probability; the position with the largest difference.
    assert "77.9%" in lost and "largest after 2 to 7 tokens of context (+0.750)" in lost
    assert diversity == ("Diversity, distinct-2: 0.5 times the teacher's (0.4 to 0.6), teacher 0.8, student 0.4.")
    (gained,) = verdict.gained
    assert gained.startswith("third") and "better than its teacher" in gained
    undecided, agreement = verdict.undecided
    assert agreement.startswith("Likelihood, agreement: 0.5 times the teacher's (0.7 to 1.2)")
    assert "a loss above 0.188 nats per token is excluded" in undecided


@pytest.mark.parametrize(
    ("better", "low", "high", "expected"),
    [
        ("lower", 0.1, 0.2, "lost"),
        ("higher", 0.1, 0.2, "gained"),
        ("lower", -0.2, -0.1, "gained"),
        ("teacher", -0.2, -0.1, "lost"),
        ("lower", -0.1, 0.1, "undecided"),
    ],
)
def test_direction_of_a_figure_decides_where_it_is_named(
    write_run: WriteRun, better: str, low: float, high: float, expected: str
) -> None:
    figure = suite()["figures"][0] | {"compared": "difference", "better": better, "low": low, "high": high}
    verdict = verdict_of(read_run(write_run(results={"exposure": suite(figures=[figure])})))
    assert {name: len(getattr(verdict, name)) for name in ("lost", "gained", "undecided")} == {
        "lost": 0,
        "gained": 0,
        "undecided": 0,
        expected: 1,
    }


def test_a_run_without_evaluation_and_one_without_end_have_reports(write_run: WriteRun) -> None:
    page = Page(write_report(write_run("plain")).read_text())
    text = "".join(page.text)
    assert "was not evaluated" in text and "Cost of training" in text and "has no data" not in text
    assert [each["aria-label"] or "" for each in page.all("svg")][1].startswith(
        "Loss of stage mixers: 8 at step 1, 0.5"
    )
    headline = verdict_of(read_run(write_run("cut", finished=False))).headline
    assert headline.startswith("This run is not finished (mixers 2/2)")


@pytest.mark.parametrize(
    "data",
    [
        {"figures": 3},
        [1, 2],
        "text",
        {"figures": [{"name": "x"}], "curves": [], "samples": []},
        suite(
            samples=[],
            figures=[],
            curves=[{"name": "c", "x": "x", "unit": "", "at": [1.0], "lines": {"a": [1.0, 2.0]}}],
        ),
    ],
    ids=["number", "list", "text", "part of a figure", "uneven curve"],
)
def test_results_of_unknown_form_are_shown_as_they_are(write_run: WriteRun, data: Any) -> None:
    run = read_run(write_run(results={"new<suite>": data}))
    (section,) = suite_sections(run)
    (item,) = section.items
    assert isinstance(item, Folded) and json.loads(item.text) == data
    assert section.title == "New<suite>" and section.anchor == "section-new-suite-"
    assert verdict_of(run).lost == []


def test_damaged_files_are_refused_in_a_finished_run_and_named_in_an_unfinished_one(write_run: WriteRun) -> None:
    run = write_run(results={"likelihood": [likelihood()]})
    (run / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"evaluation\.json is not the file that the run wrote"):
        write_report(run)
    run = write_run("other", results={"likelihood": [likelihood()]}, finished=False)
    (run / "evaluation.json").write_text("{")
    assert "evaluation.json cannot be read" in read_run(run).problems[0]
    (run / "evaluation.json").write_text(json.dumps({"format": 1, "likelihood": []}))
    found = read_run(run)
    assert found.problems[0].startswith("evaluation.json has format 1, which this version does not show")
    assert found.results == {}


def test_no_run_is_refused_and_another_file_may_be_written(write_run: WriteRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        write_report(tmp_path)
    run = write_run()
    written = tmp_path / "elsewhere.html"
    assert write_report(run, written) == written and not (run / "report.html").exists()
