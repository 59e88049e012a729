"""Export of phases and memory readings to Chrome's Trace Event Format, for ui.perfetto.dev and chrome://tracing.

A viewer shows a process for each ``pid``, a row of slices for each ``tid``, and a curve for each counter. The format is
described in https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embrag_ds.runtime.device_sampler import MEMORY, Reading
from embrag_ds.runtime.timeline import Span

_MIB = 1 << 20
Event = dict[str, Any]


def chrome_trace(spans: Sequence[Span], readings: Sequence[Reading], rank: int) -> dict[str, Any]:
    """The trace of one rank, as JSON types: its process, a row for each thread and stream, counters of memory in MiB.

    Times are whole microseconds after the timeline's start. They are rounded down, which keeps spans nested or apart.
    Viewers drop slices of one row that overlap otherwise. Spans of a thread and stream that do (it may use several side
    streams, and late in a run the times of CUDA events are coarse) therefore get further rows.
    """
    events: list[Event] = [_name("process_name", rank, 0, f"rank {rank}")]
    rows: list[_Row] = []
    for span in sorted(spans, key=lambda span: (span.start_s, -span.stop_s)):
        start, stop = _microseconds(span.start_s), _microseconds(span.stop_s)
        own = [row for row in rows if row.key == (span.thread, span.stream)]
        row = next((row for row in own if row.has_room(start, stop)), None)
        if row is None:
            row = _Row((span.thread, span.stream), number=len(rows) + 1)  # row 0 is the idle thread to Perfetto
            rows.append(row)
            label = f"{span.thread}, {span.stream}" + (f" ({len(own) + 1})" if own else "")
            events.append(_name("thread_name", rank, row.number, label))
        row.stops.append(stop)
        place = {"pid": rank, "tid": row.number}
        events.append({"name": span.name, "cat": "phase", "ph": "X", "ts": start, "dur": stop - start, **place})
    for reading in readings:
        time = _microseconds(reading.seconds)
        for field, label in MEMORY.items():
            held = getattr(reading, field)
            if held is not None:
                value = {"MiB": held / _MIB}
                events.append({"name": f"memory: {label}", "ph": "C", "ts": time, "pid": rank, "args": value})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


class _Row:
    """A row of slices, filled in the order of their starts, the longest first."""

    def __init__(self, key: tuple[str, str], number: int):
        self.key = key
        self.number = number
        self.stops: list[int] = []  # of the slices that are open, each inside the one before

    def has_room(self, start: int, stop: int) -> bool:
        """Whether a slice from ``start`` to ``stop`` would lie inside those that are open at ``start``."""
        while self.stops and self.stops[-1] <= start:
            self.stops.pop()
        return not self.stops or stop <= self.stops[-1]


def _microseconds(seconds: float) -> int:
    return int(seconds * 1e6)


def _name(kind: str, rank: int, row: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": rank, "tid": row, "args": {"name": name}}
