"""Ctrl-C and SIGTERM: the step in progress ends, its checkpoint is written, and the run can be resumed from there."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Final

from xarch_kd.errors import Interrupted

SAME_REQUEST_SECONDS: Final = 1.0


class StopSignals:
    """While entered, SIGINT and SIGTERM are requests to stop.

    Inside `deferred()` a request waits for the end of the step (`requested` is then the signal's name) and a second one
    stops at once; elsewhere, where there is no step to save, it raises Interrupted immediately. Signals within a second
    of the first are the same request: launchers, terminals and supervisors send several at once. `resume_point` returns
    where a resumed run starts, read from its files when the message is made. `clock` returns seconds.
    """

    def __init__(
        self, resume_command: str, resume_point: Callable[[], str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.resume_command = resume_command
        self.resume_point = resume_point
        self.requested: str | None = None
        self._clock = clock
        self._since = 0.0
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A span in which a request waits to be looked at; `check` raises it afterwards."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def agree(self, any_rank: Callable[[bool], bool]) -> None:
        """Make a request to one process a request to all; `any_rank` returns whether a flag is true on any rank."""
        if any_rank(self.requested is not None) and self.requested is None:
            self.requested = "a signal to another process"

    def check(self) -> None:
        """Raise Interrupted if a stop was requested."""
        if self.requested is not None:
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """The error that ends the run; its text holds where a resumed run starts, and the command."""
        return Interrupted(f"stopped by {self.requested}; {self.resume_point()}. Resume with:\n  {self.resume_command}")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, now = self.requested is not None, self._clock()
        if again and now - self._since < SAME_REQUEST_SECONDS:
            return
        self.requested, self._since = signal.Signals(number).name, now
        if again or not self._deferred:
            raise self.interrupted()
        print(
            f"\n{self.requested}: stopping after this step, with a checkpoint (once more to stop at once, without one)",
            file=sys.stderr,
            flush=True,
        )
