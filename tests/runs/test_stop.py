"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
import time

import pytest

from embrag_ds.runs import stop
from embrag_ds.runs.stop import SIGNALS, StopSignals


def test_the_first_signal_is_noted_and_said_with_what_to_expect(caplog: pytest.LogCaptureFixture) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    for number in SIGNALS:
        caplog.clear()
        with StopSignals(lambda: " (in 99 s)") as signals:
            assert signals.received == 0
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == number
            until = time.monotonic() + 10
            while not caplog.messages and time.monotonic() < until:
                time.sleep(0.01)
        (said,) = caplog.messages
        name = signal.Signals(number).name
        assert said.startswith(f"{name}: a checkpoint at the next step boundary, then the end (in 99 s)")
        assert ("Ctrl-C again ends at once" in said) is (number == signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_interrupts_at_once(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    with StopSignals() as signals:
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # one press, passed on twice
        assert signals.received == first
        now[0] += 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
