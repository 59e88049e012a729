"""Where a step's time goes: spans of named phases, by thread and stream.

On a CUDA device a phase is a pair of timing events on the stream that is current when it begins, so nothing is
waited for; on a CPU it is wall-clock time. Phases overlap: what runs ahead of the step or behind its back has a
thread and a stream of its own, which every span names.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

PHASES = ("collate", "search", "h2d", "forward", "backward", "step", "refresh")
"""What a run measures. ``collate`` contains ``search`` and ``h2d``; ``h2d`` is many copies a batch."""

CAPACITY = 4096


@dataclass(frozen=True)
class Span:
    """One phase, from ``start_s`` to ``stop_s`` in seconds after the timeline's start.

    ``stream`` is ``cpu``, ``default stream`` or ``side stream``. On a stream a span begins when what was queued
    before it is done, and lasts until what was queued in it is.
    """

    name: str
    thread: str
    stream: str
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class PhaseTotal:
    """A phase on one thread and stream: ``count`` spans, of which the latest ``kept`` make up the milliseconds."""

    name: str
    thread: str
    stream: str
    count: int
    kept: int
    total_ms: float
    median_ms: float


@dataclass
class _Marks:
    """Starts and stops of a phase on one thread and stream: times, or events of a CUDA stream."""

    pairs: deque[tuple[Any, Any]]
    count: int = 0


class _Muted(threading.local):
    """Whether the current thread's phases are left out."""

    now = False


class Timeline:
    """Collects the spans of a run; any thread may measure. Seconds count from its construction.

    The latest ``capacity`` spans of a phase on a thread are kept, older ones only counted. A phase that raises is
    not recorded.
    """

    def __init__(self, device: torch.device, capacity: int = CAPACITY):
        """On a CUDA device this waits, once, for its current stream, so that both clocks begin together."""
        self._device = device
        self._capacity = capacity
        self._marks: dict[tuple[str, str, str], _Marks] = {}
        self._lock = threading.Lock()
        self._muted = _Muted()
        self._origin: Any = None
        if device.type == "cuda":
            self._origin = torch.cuda.Event(enable_timing=True)
            self._origin.record(torch.cuda.current_stream(device))
            self._origin.synchronize()
        self.began = time.perf_counter()
        """Of :func:`time.perf_counter`, in seconds."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measure what is done, or queued on the current stream, inside ``with``."""
        if self._muted.now:
            return nullcontext()
        return self._on_cpu(name) if self._origin is None else self._on_stream(name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what the current thread does meanwhile; others are measured on."""
        self._muted.now = True
        try:
            yield
        finally:
            self._muted.now = False

    def spans(self) -> list[Span]:
        """What is kept, in the order of the starts; what the device has not finished is absent, not waited for."""
        with self._lock:
            copies = [(key, list(marks.pairs)) for key, marks in self._marks.items()]
        found = [
            Span(*key, *self._seconds(start, stop)) for key, pairs in copies for start, stop in pairs if _done(stop)
        ]
        return sorted(found, key=lambda span: span.start_s)

    def totals(self) -> list[PhaseTotal]:
        """Every phase by thread and stream, in the order of :data:`PHASES`."""
        lasted: dict[tuple[str, str, str], list[float]] = {}
        for span in self.spans():
            taken = lasted.setdefault((span.name, span.thread, span.stream), [])
            taken.append(1000 * (span.stop_s - span.start_s))
        return [
            PhaseTotal(*key, self._marks[key].count, len(taken), sum(taken), statistics.median(taken))
            for key, taken in sorted(lasted.items(), key=lambda item: (_place(item[0][0]), item[0]))
        ]

    @contextmanager
    def _on_cpu(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._keep(name, "cpu", start, time.perf_counter())

    @contextmanager
    def _on_stream(self, name: str) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        start = torch.cuda.Event(enable_timing=True)
        start.record(stream)
        yield
        stop = torch.cuda.Event(enable_timing=True)
        stop.record(stream)
        default = stream == torch.cuda.default_stream(self._device)
        self._keep(name, "default stream" if default else "side stream", start, stop)

    def _keep(self, name: str, stream: str, start: Any, stop: Any) -> None:
        key = (name, threading.current_thread().name, stream)
        with self._lock:
            if key not in self._marks:
                self._marks[key] = _Marks(deque(maxlen=self._capacity))
            self._marks[key].pairs.append((start, stop))
            self._marks[key].count += 1

    def _seconds(self, start: Any, stop: Any) -> tuple[float, float]:
        if self._origin is None:
            return start - self.began, stop - self.began
        # An event's distance is a float32 in ms: hours after the origin it is too coarse for a span's length.
        begins = self._origin.elapsed_time(start) / 1000
        return begins, begins + start.elapsed_time(stop) / 1000


class _NoTimeline(Timeline):
    """Measures nothing, at no cost."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def phase(self, name: str) -> AbstractContextManager[None]:
        return _NOTHING


_NOTHING: AbstractContextManager[None] = nullcontext()
NO_TIMELINE: Timeline = _NoTimeline()
"""What is measured by default: nothing."""


def _done(mark: Any) -> bool:
    return isinstance(mark, float) or mark.query()


def _place(name: str) -> int:
    return PHASES.index(name) if name in PHASES else len(PHASES)
