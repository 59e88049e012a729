"""Timeline: spans and totals of phases from any thread, in bounded memory and without synchronisation."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline

CPU = torch.device("cpu")


def test_spans_last_as_long_as_their_phase_and_nest() -> None:
    before = time.perf_counter()
    timeline = Timeline(CPU)
    with timeline.phase("collate"):
        with timeline.phase("search"):
            time.sleep(0.02)
        time.sleep(0.01)
    with timeline.phase("search"):
        pass
    whole = time.perf_counter() - before
    outer, inner, last = timeline.spans()
    assert [span.name for span in (outer, inner, last)] == ["collate", "search", "search"]
    assert 0 <= outer.start_s <= inner.start_s and inner.stop_s <= outer.stop_s <= last.start_s <= whole
    assert inner.stop_s - inner.start_s >= 0.02 and outer.stop_s - inner.stop_s >= 0.01
    assert {(span.thread, span.stream) for span in timeline.spans()} == {("MainThread", "cpu")}


def test_threads_are_recorded_apart() -> None:
    timeline = Timeline(CPU)

    def measure(name: str, times: int) -> None:
        for _ in range(times):
            with timeline.phase(name):
                pass

    threads = [
        threading.Thread(target=measure, args=each, name=thread)
        for thread, each in {"ahead": ("collate", 500), "behind": ("refresh", 300), "other": ("collate", 200)}.items()
    ]
    for thread in threads:
        thread.start()
    measure("forward", 100)
    for thread in threads:
        thread.join()
    counts = [(each.name, each.thread, each.count) for each in timeline.totals()]
    expected = [("collate", "ahead", 500), ("collate", "other", 200)]
    assert counts == [*expected, ("forward", "MainThread", 100), ("refresh", "behind", 300)]


def test_totals_are_those_of_the_spans() -> None:
    timeline = Timeline(CPU)
    for _ in range(5):
        with timeline.phase("step"):
            time.sleep(0.001)
    (total,) = timeline.totals()
    lasted = [1000 * (span.stop_s - span.start_s) for span in timeline.spans()]
    assert total.total_ms == pytest.approx(sum(lasted)) and total.median_ms == pytest.approx(np.median(lasted))
    assert total.kept == total.count == 5


def test_memory_is_bounded_and_nothing_is_lost_from_the_count() -> None:
    timeline = Timeline(CPU, capacity=3)
    for _ in range(10):
        with timeline.phase("step"):
            pass
    with timeline.phase("refresh"):  # frequent phases do not displace rare ones
        pass
    step, refresh = timeline.totals()
    assert (step.kept, step.count, refresh.kept) == (3, 10, 1)
    assert len(timeline.spans()) == 4


def test_a_pause_is_of_one_thread_only() -> None:
    timeline = Timeline(CPU)

    def measure() -> None:
        with timeline.phase("refresh"):
            pass

    with timeline.paused():
        other = threading.Thread(target=measure)
        other.start()
        other.join()
        with timeline.phase("collate"):
            pass
    with timeline.phase("step"):
        pass
    assert [span.name for span in timeline.spans()] == ["refresh", "step"]


def test_a_phase_that_fails_is_not_recorded() -> None:
    timeline = Timeline(CPU)
    with pytest.raises(KeyError), timeline.phase("search"):
        raise KeyError
    assert timeline.spans() == []


def test_without_a_timeline_nothing_is_kept() -> None:
    with NO_TIMELINE.phase("step"), NO_TIMELINE.paused(), NO_TIMELINE.phase("search"):
        pass
    assert NO_TIMELINE.spans() == NO_TIMELINE.totals() == []


@pytest.mark.gpu
def test_measuring_on_the_gpu_waits_for_nothing() -> None:
    device = torch.device("cuda", 0)
    timeline = Timeline(device)
    busy = torch.ones(4096, 4096, device=device)
    side = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        began = time.perf_counter()
        with timeline.phase("forward"):
            for _ in range(200):
                busy = (busy @ busy).clamp_(0, 1)
        with torch.cuda.stream(side), timeline.phase("h2d"):
            torch.ones(16, device=device).mul_(2)
        queued = time.perf_counter() - began
        unfinished = timeline.spans()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert "forward" not in [span.name for span in unfinished]
    torch.cuda.synchronize(device)
    streams = {span.name: span.stream for span in timeline.spans()}
    assert streams == {"forward": "default stream", "h2d": "side stream"}
    forward = next(span for span in timeline.spans() if span.name == "forward")
    assert forward.stop_s - forward.start_s > queued
