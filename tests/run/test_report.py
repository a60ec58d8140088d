"""Progress of work: silent for 3 seconds, then a rate and an ETA, live on a terminal and in plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from xarch_kd.run.report import Reporter


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def _work(seconds_per_batch: float, batches: int, *, terminal: bool = False, total: int | None = 4096) -> str:
    text, clock = io.StringIO(), Clock()
    console = Console(file=text, width=200, force_terminal=terminal, legacy_windows=False)
    with Reporter(console, clock=clock).work("measuring", total, "tokens") as work:
        for _ in range(batches):
            clock.now += seconds_per_batch
            work.advance(1024)
    return text.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_work_that_ends_within_three_seconds_prints_nothing(terminal: bool) -> None:
    assert _work(0.75, 4, terminal=terminal) == ""


def test_plain_lines_hold_rate_and_eta_and_come_every_ten_seconds() -> None:
    # Batches end after 4, 8, 12 and 16 seconds: the first line comes after the 3rd second, the next 10 seconds later.
    assert _work(4.0, 4).splitlines() == [
        "measuring  1,024/4,096 tokens  256 tokens/s  ETA 0:12",
        "measuring  4,096/4,096 tokens  256 tokens/s  ETA 0:00",
        "measuring: 4,096 tokens in 0:16, 256 tokens/s",
    ]


def test_without_a_total_there_is_a_rate_alone() -> None:
    assert _work(128.0, 1, total=None).splitlines() == [
        "measuring  1,024 tokens  8.00 tokens/s",
        "measuring: 1,024 tokens in 2:08, 8.00 tokens/s",
    ]


def test_a_terminal_shows_one_live_line_with_rate_and_eta_and_removes_it() -> None:
    text = _work(4.0, 4, terminal=True)
    assert "256 tokens/s" in text
    assert "4096/4096" in text
    assert "ETA" in text
    # The live line is redrawn and then erased: no plain line stays.
    assert "measuring:" not in text
    assert text.rstrip().endswith("\x1b[2K")


def test_work_that_fails_prints_no_result() -> None:
    text, clock = io.StringIO(), Clock()
    with (
        pytest.raises(RuntimeError),
        Reporter(Console(file=text, width=200), clock=clock).work("reading", 2, "rows") as work,
    ):
        clock.now += 5
        work.advance()
        raise RuntimeError
    assert text.getvalue().splitlines() == ["reading  1/2 rows  0.20 rows/s  ETA 0:05"]


def test_a_silent_reporter_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    reporter = Reporter.silent()
    reporter.clock = clock
    reporter.line("hello")
    with reporter.work("reading", 2, "rows") as work:
        clock.now += 100
        work.advance()
    assert capsys.readouterr().out == ""
