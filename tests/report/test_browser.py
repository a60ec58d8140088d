"""Reports in headless Chromium: nothing is loaded or logged, nothing overflows, every figure is described."""

from __future__ import annotations

from pathlib import Path

import pytest

from xarch_kd.report.compared_page import write_comparison
from xarch_kd.report.page import write_report
from xarch_kd.testing.browser import Browser, find_browser
from xarch_kd.testing.reports import HOSTILE, WriteRun, likelihood, suite

PROGRAM = find_browser()


@pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
def test_pages_in_a_browser(write_run: WriteRun, tmp_path: Path) -> None:
    assert PROGRAM is not None
    results = {"likelihood": [likelihood()], "diversity": suite()}
    runs = [write_run("first", results), write_run("w" * 120, results)]
    report = write_report(runs[0])
    compared = write_comparison(runs, tmp_path / "compared.html")
    with Browser(PROGRAM, tmp_path / "profile") as browser:
        backgrounds = set()
        for page in (report, compared):
            for width in (380, 1280):
                found = browser.visit(page, width=width, dark=width == 1280)
                assert found["width"] == width and found["wide"] <= 0, (page.name, width)
                assert found["figures"] >= 2 and (found["bare"], found["empty"]) == (0, 0)
                assert found["errors"] == []
                assert [url for url in found["requests"] if not url.startswith("data:")] == [page.as_uri()]
                backgrounds.add(found["background"])
                if page == report:
                    assert found["title"] == "first"
                    assert all(sample in found["text"] for sample in HOSTILE[:2])
                    assert r"before\x00after\x1b[31m" in found["text"]
        # Light at one width, dark at the other.
        assert len(backgrounds) == 2
        broken = tmp_path / "broken.html"
        broken.write_text(
            "<body style='min-width: 500px'><svg></svg><img src='http://127.0.0.1:9/x.png'><script>nothing()</script>"
        )
        found = browser.visit(broken, width=380)
        assert found["wide"] > 0 and found["bare"] == 2 and found["errors"] and len(found["requests"]) == 2
