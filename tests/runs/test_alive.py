"""A rank notices others that have stopped or hang, and is not alarmed by those that are busy."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embrag_ds.runs import alive
from embrag_ds.runs.alive import FOLDER, Watch, beat, busy

PATIENCE_S = 0.6
LONG_S = 3 * PATIENCE_S
FAR_OFF = {"pulse": 1, "beats": 5, "step": 7, "phase": "", "waits": False, "host": "n2", "pid": 4711}


@contextmanager
def watched(folder: Path, **others: object) -> Iterator[list[str]]:
    """Lines with which this rank 0 would have ended. Rank 1 writes what ``others`` says, repeatedly if it ``lives``."""
    lives = bool(others.pop("lives", False))
    ended = threading.Event()
    (folder / FOLDER).mkdir()

    def write() -> None:
        pulse = 1
        while True:
            sign = {**FAR_OFF, **others, "pulse": pulse}
            (folder / FOLDER / "new").write_text(json.dumps(sign))
            (folder / FOLDER / "new").rename(folder / FOLDER / "rank1")
            pulse += 1
            if not lives or ended.wait(PATIENCE_S / 20):
                return

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.05)
    said: list[str] = []
    watch = Watch(folder, 0, 2, PATIENCE_S, said.append)
    beat(7)
    try:
        yield said
    finally:
        watch.close()
        ended.set()
        writer.join()


def test_a_process_that_no_longer_writes_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), watched(tmp_path) as said:
        time.sleep(LONG_S)
    (line,) = said
    assert line.startswith(
        "no sign of progress in 0.6 s (embrag.train.patience_s) from rank 1 (n2, process 4711), last"
    )
    assert f"last at step 7; all ranks end: see what stopped it, and go on with --resume --run-dir {tmp_path}" in line
    (record,) = caplog.records
    assert record.getMessage() == line and record.levelno == logging.ERROR


def test_a_rank_whose_file_has_gone_is_named(tmp_path: Path) -> None:
    with watched(tmp_path) as said:
        time.sleep(PATIENCE_S / 4)
        (tmp_path / FOLDER / "rank1").unlink()
        time.sleep(LONG_S)
    assert len(said) == 1 and "rank 1 (n2, process 4711)" in said[0]


def test_nobody_is_named_while_this_rank_gets_on(tmp_path: Path) -> None:
    with watched(tmp_path) as said:
        until = time.monotonic() + LONG_S
        while time.monotonic() < until:
            beat()
            time.sleep(0.01)
    assert said == []


@pytest.mark.parametrize(
    ("phase", "waits", "own_waits", "alarmed"),
    [
        ("", False, True, True),  # its main thread hangs outside of collectives
        ("validation", False, True, False),
        ("", True, True, False),  # both wait: nobody can tell for whom
        ("", False, False, False),  # this one is not waiting for it
    ],
)
def test_a_process_that_lives_but_does_not_get_on(
    phase: str, waits: bool, own_waits: bool, alarmed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alive, "_main_thread_waits", lambda: own_waits)
    with watched(tmp_path, lives=True, phase=phase, waits=waits) as said:
        time.sleep(LONG_S)
    assert len(said) == alarmed


def test_a_phase_of_this_rank_may_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "_main_thread_waits", lambda: True)
    with watched(tmp_path, lives=True) as said, busy("saving"):
        time.sleep(LONG_S)
        assert json.loads((tmp_path / FOLDER / "rank0").read_text())["phase"] == "saving"
    assert said == []


def test_the_start_may_take_long_until_the_first_step(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    watch = Watch(tmp_path, 1, 2, PATIENCE_S)
    assert json.loads((tmp_path / FOLDER / "rank1").read_text())["phase"] == "start"
    beat(1)
    time.sleep(PATIENCE_S / 4)
    written = json.loads((tmp_path / FOLDER / "rank1").read_text())
    watch.close()
    assert (written["phase"], written["step"]) == ("", 1)
    assert not (tmp_path / FOLDER).exists()


def test_a_full_disk_alarms_nobody(tmp_path: Path) -> None:
    """A file is written over in place, and keeps its size."""
    watch = Watch(tmp_path, 0, 2, PATIENCE_S, lambda line: None)
    file = tmp_path / FOLDER / "rank0"
    size, number = file.stat().st_size, file.stat().st_ino
    with busy("a phase whose name is longer than the others"):
        time.sleep(PATIENCE_S / 4)
        assert (file.stat().st_size, file.stat().st_ino) == (size, number)
        assert json.loads(file.read_text())["phase"].startswith("a phase")
    watch.close()


def test_only_the_first_of_those_that_live_talks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ranks 1 and 2 find rank 0 silent; the terminal shows one line, of rank 1."""
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "rank0").write_text(json.dumps(FAR_OFF))
    with caplog.at_level(logging.INFO):
        watches = [Watch(tmp_path, rank, 3, PATIENCE_S, lambda line: None) for rank in (1, 2)]
        beat(7)
        time.sleep(LONG_S)
    for watch in watches:
        watch.close()
    levels = sorted(each.levelno for each in caplog.records if "from rank 0 (n2" in each.getMessage())
    assert levels == [logging.INFO, logging.ERROR]
