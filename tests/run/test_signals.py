"""Ctrl-C and SIGTERM: put off until the step is over, immediate elsewhere, and the old handlers come back."""

from __future__ import annotations

import os
import signal

import pytest

from xarch_kd.errors import Interrupted
from xarch_kd.run.signals import StopSignals

COMMAND = "xarch-kd train m.yaml --output runs/m --resume"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_a_step_a_signal_stops_at_once(number: signal.Signals) -> None:
    with StopSignals(COMMAND), pytest.raises(Interrupted, match=f"stopped by {number.name}") as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 130
    assert COMMAND in str(stopped.value)


def test_inside_a_step_it_waits(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals(COMMAND) as signals:
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.requested == "SIGTERM"
        with pytest.raises(Interrupted):
            signals.check()
    assert "stopping after this step" in capfd.readouterr().err


def test_a_second_signal_does_not_wait(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals(COMMAND) as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_before_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals(COMMAND):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_nothing_requested_is_no_stop() -> None:
    with StopSignals(COMMAND) as signals:
        signals.check()
        assert signals.requested is None
