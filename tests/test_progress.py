"""Progress of long work: lines in a log, a bar on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds import progress
from embrag_ds.progress import Progress, spoken


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of day, in its only element."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_have_share_rate_and_time_left(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="embrag_ds")
    with Progress("packing p.vcf.gz", None, "sites") as packing, Progress("imputing", 8) as imputing:
        for _ in range(3):
            clock[0] += 1.5
            packing.advance(1500)
            imputing.advance(2)
    assert caplog.messages == [
        "packing p.vcf.gz: 3,000 sites, 1,000 a second",
        "imputing: 50 %, 3 s left",
    ]
    with Progress("adapting", 300, "steps") as adapting:
        clock[0] += 30  # the first step compiles
        adapting.advance(1)
        clock[0] += 4
        adapting.advance(9)
    assert caplog.messages[2:] == ["adapting: 10 of 300 steps, 3 %, 2.2 a second, 2 min 9 s left"]


def test_gaps_between_lines_grow_and_the_end_is_left_to_the_caller(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="embrag_ds")
    said = []
    with Progress("imputing", 1000) as work:
        for second in range(1, 1001):
            clock[0] += 1
            before = len(caplog.messages)
            work.advance()
            if len(caplog.messages) > before:
                said.append(second)
    gaps = [after - before for before, after in zip([0, *said], said, strict=False)]
    assert gaps[:6] == [2, 4, 8, 16, 32, 60] and set(gaps[6:]) == {60} and 1000 not in said


def test_nothing_is_said_by_other_ranks_or_where_it_is_not_to_be_shown(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="embrag_ds")
    works = [Progress("packing", None, "sites", shown=False)]
    monkeypatch.setenv("RANK", "1")
    works.append(Progress("packing", None, "sites"))
    for work in works * 2:
        clock[0] += 10
        work.advance()
    assert not caplog.messages


def test_nothing_done_and_more_than_all_are_no_fault(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="embrag_ds")
    for total in (0, 5):
        with Progress("reading", total, "sites") as work:
            for parts in (0, 0, 3, 9):
                clock[0] += 10
                work.advance(parts)
    assert caplog.messages == ["reading: 3 of 5 sites, 60 %, 0.1 a second, 14 s left"]


def test_without_a_terminal_to_ask_there_are_lines(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="embrag_ds")
    closed = io.StringIO()
    closed.close()
    for stderr in (None, closed):
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress("reading", 9) as work:
            for _ in range(2):
                clock[0] += 10
                work.advance()
    assert len(caplog.messages) == 2


@given(st.floats(0, 1e7))
def test_a_duration_in_words_is_at_least_the_duration_and_at_most_one_small_unit_more(seconds: float) -> None:
    sizes = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    words = spoken(seconds).split()
    units = [sizes[unit] for unit in words[1::2]]
    total = sum(int(number) * unit for number, unit in zip(words[::2], units, strict=True))
    assert len(units) <= 2 and units == sorted(units, reverse=True)
    small = min(units) if len(units) == 2 or units == [1] else {60: 1, 3600: 60, 86400: 3600}[units[0]]
    assert seconds - small < total <= seconds + small


def test_on_a_terminal_it_is_a_bar_that_goes(root: Path) -> None:
    code = """
import time
from embrag_ds import logs
from embrag_ds.progress import Progress
with logs.on_terminal(), Progress("adapting", 4, "steps") as work:
    for _ in range(4):
        time.sleep(1.1)
        work.advance()
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(root)}
    script = f"stty cols 80 rows 24; exec {sys.executable} -c '{code}'"
    process = subprocess.Popen(["bash", "-c", script], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while more := os.read(ours, 4096):
            shown += more
    except OSError:  # the terminal's other side is closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0, shown
    states = [each for each in re.split(r"[\r\n]+", shown.decode()) if each.strip()]
    assert re.search(r"adapting:  50 %\|.+\| 2/4 steps, .+ steps/s, 00:02 left", "\n".join(states)), states
    assert shown.decode().rstrip("\n").endswith("\r"), "the bar is wiped at the end"
