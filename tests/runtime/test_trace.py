"""A trace holds every span once, where and when it was, in rows that viewers can draw."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.runtime.device_sampler import MEMORY, Reading
from embrag_ds.runtime.timeline import Span, Timeline
from embrag_ds.runtime.trace import chrome_trace

Event = dict[str, Any]


def written(spans: list[Span], readings: list[Reading], rank: int = 0) -> list[Event]:
    """The events as they are read back from strict JSON."""
    text = json.dumps(chrome_trace(spans, readings, rank), allow_nan=False)
    trace = json.loads(text)
    assert trace["displayTimeUnit"] == "ms"
    return trace["traceEvents"]


def slices(events: list[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X"]


def row_names(events: list[Event]) -> dict[int, str]:
    named = [event for event in events if event["ph"] == "M" and event["name"] == "thread_name"]
    names = {event["tid"]: event["args"]["name"] for event in named}
    assert len(names) == len(named) == len(set(names.values()))
    return names


def drawable(events: list[Event]) -> bool:
    """Whether slices of one row, in the order of the file, are nested or apart."""
    open_stops: dict[int, list[int]] = {}
    latest: dict[int, int] = {}
    for event in slices(events):
        start, stop = event["ts"], event["ts"] + event["dur"]
        stops = open_stops.setdefault(event["tid"], [])
        while stops and stops[-1] <= start:
            stops.pop()
        if start < latest.get(event["tid"], 0) or (stops and stop > stops[-1]):
            return False
        stops.append(stop)
        latest[event["tid"]] = start
    return True


def test_events_have_the_fields_that_viewers_read() -> None:
    spans = [Span("step", "MainThread", "default stream", 0.25, 0.5)]
    readings = [Reading(seconds=1.5, host_bytes=3 << 20, cpu_percent=50.0, allocated_bytes=1 << 19)]
    assert written(spans, readings, rank=2) == [
        {"name": "process_name", "ph": "M", "pid": 2, "tid": 0, "args": {"name": "rank 2"}},
        {"name": "thread_name", "ph": "M", "pid": 2, "tid": 1, "args": {"name": "MainThread, default stream"}},
        {"name": "step", "cat": "phase", "ph": "X", "ts": 250_000, "dur": 250_000, "pid": 2, "tid": 1},
        {"name": "memory: process", "ph": "C", "ts": 1_500_000, "pid": 2, "args": {"MiB": 3.0}},
        {"name": "memory: in tensors", "ph": "C", "ts": 1_500_000, "pid": 2, "args": {"MiB": 0.5}},
    ]


def test_a_timeline_of_two_threads() -> None:
    timeline = Timeline(torch.device("cpu"))

    def build() -> None:
        with timeline.phase("collate"):
            with timeline.phase("search"):
                time.sleep(0.002)
            with timeline.phase("h2d"):
                pass

    thread = threading.Thread(target=build, name="retrieval-prefetch")
    with timeline.phase("forward"):
        thread.start()
        thread.join()
    with timeline.phase("step"):
        pass
    spans = timeline.spans()
    events = written(spans, [])
    names = row_names(events)
    assert sorted(names.values()) == ["MainThread, cpu", "retrieval-prefetch, cpu"]
    by_name = {event["name"]: event for event in slices(events)}
    for span in spans:
        event = by_name[span.name]
        assert names[event["tid"]] == f"{span.thread}, {span.stream}"
        assert event["ts"] == pytest.approx(1e6 * span.start_s, abs=1)
        assert event["dur"] == pytest.approx(1e6 * (span.stop_s - span.start_s), abs=1)
    collate, search = by_name["collate"], by_name["search"]
    assert collate["ts"] <= search["ts"] and search["ts"] + search["dur"] <= collate["ts"] + collate["dur"]
    assert search["dur"] >= 2000
    assert drawable(events)


@st.composite
def nested_spans(draw: st.DrawFn, start: float, stop: float, place: tuple[str, str], depth: int = 0) -> list[Span]:
    """Spans of a thread as ``with`` makes them: nested or one after another, often touching."""
    cuts = sorted(draw(st.lists(st.floats(start, stop), max_size=4)))
    spans = []
    for first, last in pairwise(cuts):
        spans.append(Span(draw(st.sampled_from(["collate", "search", "h2d"])), *place, first, last))
        if depth < 2:
            spans += draw(nested_spans(first, last, place, depth + 1))
    return spans


@given(
    several=st.tuples(
        nested_spans(0.0, 1e-4, ("MainThread", "cpu")),
        nested_spans(0.0, 20_000.0, ("MainThread", "side stream")),
        nested_spans(3.0, 4.0, ("other", "cpu")),
    ),
    order=st.randoms(use_true_random=False),
)
def test_nested_spans_appear_once_in_one_row_of_their_thread_and_stream(
    several: tuple[list[Span], ...], order: Any
) -> None:
    spans = [span for each in several for span in each]
    order.shuffle(spans)
    events = written(spans, [])
    names = row_names(events)
    assert set(names.values()) == {f"{span.thread}, {span.stream}" for span in spans}
    expected = Counter(
        (span.name, f"{span.thread}, {span.stream}", int(span.start_s * 1e6), int(span.stop_s * 1e6)) for span in spans
    )
    assert expected == Counter(
        (event["name"], names[event["tid"]], event["ts"], event["ts"] + event["dur"]) for event in slices(events)
    )
    assert drawable(events)


@given(pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12))
def test_spans_that_overlap_keep_their_times_and_get_rows_of_their_own(pairs: list[tuple[int, int]]) -> None:
    spans = [Span("h2d", "prefetch", "side stream", min(pair), max(pair)) for pair in pairs]
    events = written(spans, [])
    assert Counter((event["ts"], event["dur"]) for event in slices(events)) == Counter(
        (1_000_000 * min(pair), 1_000_000 * (max(pair) - min(pair))) for pair in pairs
    )
    assert drawable(events)
    names = sorted(row_names(events).values(), key=lambda name: (len(name), name))
    assert names == ["prefetch, side stream", *(f"prefetch, side stream ({n})" for n in range(2, 13))][: len(names)]


def test_two_side_streams_of_one_thread() -> None:
    spans = [Span("search", "prefetch", "side stream", 0.0, 2.0), Span("h2d", "prefetch", "side stream", 1.0, 3.0)]
    events = written(spans, [])
    assert list(row_names(events).values()) == ["prefetch, side stream", "prefetch, side stream (2)"]


def test_what_the_machine_does_not_tell_has_no_counter() -> None:
    told = Reading(seconds=0.0, host_bytes=1 << 20, cpu_percent=None, device_bytes=2 << 20)
    events = [event for event in written([], [told, told]) if event["ph"] == "C"]
    assert [event["name"] for event in events] == 2 * ["memory: process", "memory: GPU, all"]
    every = Reading(0.0, 1, 1.0, **{name: 1 for name in MEMORY if name != "host_bytes"})
    assert len([event for event in written([], [every]) if event["ph"] == "C"]) == len(MEMORY)


def test_a_rank_that_measured_nothing_has_a_trace() -> None:
    assert [event["name"] for event in written([], [], rank=1)] == ["process_name"]
