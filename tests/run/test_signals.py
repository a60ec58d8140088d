"""Ctrl-C and SIGTERM: put off until the step is over, immediate elsewhere, and the old handlers come back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from xarch_kd.errors import Interrupted
from xarch_kd.run.signals import StopSignals

COMMAND = "xarch-kd train m.yaml --output runs/m --resume"


def signals_of(times: Iterator[float] | None = None, point: str = "the run resumes after step 3") -> StopSignals:
    return StopSignals(COMMAND, lambda: point, clock=(lambda: next(times)) if times is not None else lambda: 0.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_a_step_a_signal_stops_at_once(number: signal.Signals) -> None:
    with signals_of(), pytest.raises(Interrupted, match=f"stopped by {number.name}") as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 130
    assert COMMAND in str(stopped.value)


def test_inside_a_step_it_waits(capfd: pytest.CaptureFixture[str]) -> None:
    with signals_of() as signals:
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.requested == "SIGTERM"
        with pytest.raises(Interrupted):
            signals.check()
    assert "stopping after this step" in capfd.readouterr().err


def test_a_later_second_signal_does_not_wait(capfd: pytest.CaptureFixture[str]) -> None:
    with signals_of(iter([10.0, 12.0]), point="the run resumes after step 250") as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="stopped by SIGTERM; the run resumes after step 250"):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_signals_at_once_are_one_request(capfd: pytest.CaptureFixture[str], second: signal.Signals) -> None:
    with signals_of(iter([10.0, 10.01])) as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), second)
        assert signals.requested == "SIGINT"
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_a_second_signal_does_not_interrupt_what_the_first_ended() -> None:
    cleaned = False
    with signals_of(iter([10.0, 10.01])), pytest.raises(Interrupted):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_the_handlers_before_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with signals_of():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_nothing_requested_is_no_stop() -> None:
    with signals_of() as signals:
        signals.check()
        assert signals.requested is None
