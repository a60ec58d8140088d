"""Messages and progress lines of a run: one object that every part of it prints through."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Final, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from xarch_kd.display import AsIs
from xarch_kd.errors import printable

# Work that ends sooner shows no progress.
QUIET_SECONDS: Final = 3.0
# Between two plain lines of one piece of work, where there is no terminal.
LINE_SECONDS: Final = 10.0

Item = TypeVar("Item")


class Reporter:
    """The console of a run. `clock` returns seconds; tests give their own.

    Ranks other than 0 have a reporter with a quiet console.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.console = console or Console()
        self.clock = clock

    @classmethod
    def silent(cls) -> Reporter:
        """Return a reporter that prints nothing."""
        return cls(Console(quiet=True))

    def line(self, text: str) -> None:
        """Print one message as it is, without highlighting or wrapping, control characters escaped."""
        self.console.print(printable(text), highlight=False, soft_wrap=True, markup=False, emoji=False)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or a panel."""
        self.console.print(AsIs(renderable))

    def work(self, name: str, total: int | None, unit: str) -> Work:
        """Return the progress of `total` units of work (None: not known yet), to be entered for its duration."""
        return Work(self, name, total, unit)


class Work:
    """Progress of one piece of work, shown with rate and ETA once it lasts longer than 3 seconds.

    A live line on a terminal, which goes when the work is done; elsewhere a plain line every 10 seconds and one at the
    end.
    """

    def __init__(self, reporter: Reporter, name: str, total: int | None, unit: str) -> None:
        self.name, self.total, self.unit, self.done = printable(name), total, unit, 0
        self._reporter = reporter
        self._live: Progress | None = None
        self._started = self._next_line = 0.0

    def __enter__(self) -> Work:
        self._started = self._reporter.clock()
        self._next_line = self._started + QUIET_SECONDS
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif error is None and self._next_line > self._started + QUIET_SECONDS:
            elapsed = self._reporter.clock() - self._started
            rate = shown_rate(self.done, elapsed, self.unit)
            self._reporter.line(f"{self.name}: {self.done:,} {self.unit} in {clock(elapsed)}, {rate}")

    def advance(self, count: int = 1) -> None:
        """Count units that were just done."""
        self.at(self.done + count)

    def at(self, done: int, total: int | None = None) -> None:
        """Set how many units are done, and how many there are if that is known only now."""
        self.done, self.total = done, self.total if total is None else total
        now = self._reporter.clock()
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=self.done, total=self.total)
        elif now > self._next_line:
            if self._reporter.console.is_terminal:
                self._live = self._begin(now)
            else:
                self._reporter.line(self._line(now - self._started))
                self._next_line = now + LINE_SECONDS

    def track(self, items: Iterable[Item], count: Callable[[Item], int]) -> Iterator[Item]:
        """Yield the items, and count what each holds when the next is asked for."""
        for item in items:
            yield item
            self.advance(count(item))

    def _line(self, elapsed: float) -> str:
        rate = shown_rate(self.done, elapsed, self.unit)
        if self.total is None or self.done == 0:
            return f"{self.name}  {self.done:,} {self.unit}  {rate}"
        left = elapsed / self.done * max(self.total - self.done, 0)
        return f"{self.name}  {self.done:,}/{self.total:,} {self.unit}  {rate}  ETA {clock(left)}"

    def _begin(self, now: float) -> Progress:
        live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            RateColumn(self.unit),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=self._reporter.console,
            transient=True,
            get_time=self._reporter.clock,
        )
        live.start()
        live.add_task(self.name, total=self.total, completed=self.done)
        # The rate counts from the start of the work, not from when the line appeared.
        live.tasks[0].start_time = self._started
        return live


class RateColumn(ProgressColumn):
    """Units per second since the work began; rich has a rate of bytes alone."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Return the rate as text."""
        return Text(shown_rate(task.completed, task.elapsed or 0.0, self.unit))


def shown_rate(done: float, seconds: float, unit: str) -> str:
    """Return a rate as text, e.g. `1,234 tokens/s`; with two decimals below 10 units per second."""
    rate = done / seconds if seconds > 0 else 0.0
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2f} {unit}/s"


def clock(seconds: float) -> str:
    """Return seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
