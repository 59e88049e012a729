"""Timing of named phases of a training step, by thread and CUDA stream.

On a CUDA device a phase is measured by a pair of events on the current stream, so the host never waits. On a CPU it is
wall-clock time. Phases may overlap: prefetching and refreshing have threads and streams of their own, which every span
names.
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
"""Names of the phases. ``collate`` contains ``search`` and ``h2d``; ``h2d`` is measured several times per batch."""

CAPACITY = 4096
"""Default number of spans kept per phase, thread and stream."""


@dataclass(frozen=True)
class Span:
    """One execution of a phase, from ``start_s`` to ``stop_s`` in seconds after the timeline's start.

    ``stream`` is ``cpu``, ``default stream`` or ``side stream``. On a CUDA stream a span begins when the work queued
    before it is done, and ends when the work queued in it is.
    """

    name: str
    thread: str
    stream: str
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class PhaseTotal:
    """Total and median time in ms of a phase on one thread and stream, over the ``kept`` latest of ``count`` spans."""

    name: str
    thread: str
    stream: str
    count: int
    kept: int
    total_ms: float
    median_ms: float


@dataclass
class _Marks:
    """Start and stop of the kept spans of a phase: :func:`time.perf_counter` times, or CUDA events."""

    pairs: deque[tuple[Any, Any]]
    count: int = 0


class _Muted(threading.local):
    """Whether phases of the current thread are ignored."""

    now = False


class Timeline:
    """Recorder of the spans of a run, usable from any thread. Seconds count from its construction.

    The latest ``capacity`` spans of a phase per thread and stream are kept; older ones are only counted. A phase that
    raises an exception is not recorded.
    """

    def __init__(self, device: torch.device, capacity: int = CAPACITY):
        """On a CUDA device, synchronises the current stream once, so that host and device clocks start together."""
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
        """Start of the timeline, a :func:`time.perf_counter` time in seconds."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Context that measures the work done, or queued on the current stream, inside it as phase ``name``."""
        if self._muted.now:
            return nullcontext()
        return self._on_cpu(name) if self._origin is None else self._on_stream(name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which phases of the current thread are not recorded; those of other threads are."""
        self._muted.now = True
        try:
            yield
        finally:
            self._muted.now = False

    def spans(self) -> list[Span]:
        """Kept spans in the order of their starts, without those that the device has not finished; never waits."""
        with self._lock:
            copies = [(key, list(marks.pairs)) for key, marks in self._marks.items()]
        found = [
            Span(*key, *self._seconds(start, stop)) for key, pairs in copies for start, stop in pairs if _done(stop)
        ]
        return sorted(found, key=lambda span: span.start_s)

    def totals(self) -> list[PhaseTotal]:
        """Totals of every phase by thread and stream, in the order of :data:`PHASES`; unknown names follow."""
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
        # elapsed_time is a float32 in ms, which hours after the origin is too coarse for the length of a span. So the
        # length is measured from the span's own start.
        begins = self._origin.elapsed_time(start) / 1000
        return begins, begins + start.elapsed_time(stop) / 1000


class _NoTimeline(Timeline):
    """Timeline that records nothing."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def phase(self, name: str) -> AbstractContextManager[None]:
        return _NOTHING


_NOTHING: AbstractContextManager[None] = nullcontext()
NO_TIMELINE: Timeline = _NoTimeline()
"""Default timeline, which records nothing."""


def _done(mark: Any) -> bool:
    """Whether a stop mark, a time or a CUDA event, has been reached."""
    return isinstance(mark, float) or mark.query()


def _place(name: str) -> int:
    """Position of a phase in :data:`PHASES`; unknown names come last."""
    return PHASES.index(name) if name in PHASES else len(PHASES)
