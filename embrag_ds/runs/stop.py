"""Signals that ask a run to end: noted, and acted on at the next step boundary, after a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What a scheduler, a launcher and Ctrl-C send."""
LAUNCHER_PATIENCE_S = 30.0
"""Seconds that DeepSpeed's launcher gives a rank between SIGTERM and SIGKILL."""


_ONE_PRESS_S = 0.5  # the launcher and the terminal may each pass on one Ctrl-C


class Stopped(Exception):
    """The run has saved a checkpoint and ends, because the signal ``number`` asked it to."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Context in which :data:`SIGNALS` are noted instead of ending the process; a second SIGINT interrupts at once.

    ``received`` is the number of the first signal, or 0. ``expectation`` returns words about how long the checkpoint
    will take to come, for the line that is logged when the signal arrives. Only the main thread may enter.
    """

    def __init__(self, expectation: Callable[[], str] = lambda: ""):
        self.received = 0
        self.expectation = expectation
        self._interrupted: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *fault: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > _ONE_PRESS_S:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        if not self.received:
            self.received = number
            text = f"{signal.Signals(number).name}: a checkpoint at the next step boundary, then the end"
            again = "; Ctrl-C again ends at once, without one" if number == signal.SIGINT else ""
            # On a thread of its own: the main thread may hold the lock of a log handler right now.
            threading.Thread(target=logger.warning, args=(f"{text}{self.expectation()}{again}",), daemon=True).start()
